"""Text: documents, their sides, windows of tokens."""
