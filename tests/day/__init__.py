"""The day of docs/llava.md: its figures and its commands."""
