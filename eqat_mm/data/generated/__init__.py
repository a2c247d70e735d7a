"""Text that a model writes itself."""
