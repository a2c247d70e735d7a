"""The demo LLaVA: a small, really trained vision-language model, put together from the parts in this folder."""

from llava_adapters.demo_llava.build import demo_llava_folder

__all__ = ["demo_llava_folder"]
