"""The demo LLaVA: a small, really trained vision-language model, put together from the parts in this folder."""
