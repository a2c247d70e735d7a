"""What `eqat verify` sees."""
