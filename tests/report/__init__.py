"""The page about a run, and what it is made of."""
