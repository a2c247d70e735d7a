"""The demo of eqat-mm: a language model, a LLaVA, a text, questions about images, and the settings tuned for them.

It plugs in as any other package does (`eqat_mm.runtime.plugins`); nothing in eqat-mm knows of it.
"""
