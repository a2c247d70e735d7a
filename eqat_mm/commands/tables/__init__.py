"""Several jobs beside each other, in one table."""
