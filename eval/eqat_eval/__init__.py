"""Judging a model: perplexity, distance from its full-precision reference, and the text it writes."""
