"""One small file per architecture; `registry` finds the right one."""

from llava_adapters.registry import arch_for, arch_of_folder, known_archs, resolve_alias

__all__ = ["arch_for", "arch_of_folder", "known_archs", "resolve_alias"]
