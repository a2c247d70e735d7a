"""Conversations about images: records, their index, what a model reads of them."""
