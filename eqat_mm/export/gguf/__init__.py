"""GGUF, the format of llama.cpp, as of its release v0.5.0."""
