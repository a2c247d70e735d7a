"""What every run needs and no model knows: atomic files, progress, seeds, provenance, memory."""
