"""Where samples come from: pinned assets, documents, packed text windows, resumable order."""
