"""One small file per architecture; `registry` finds the right one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_adapters.registry import arch_for, arch_of_folder, known_archs, resolve_alias

__all__ = ["arch_for", "arch_of_folder", "known_archs", "resolve_alias"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from llava_adapters import registry

        return getattr(registry, name)
    raise AttributeError(f"module 'llava_adapters' has no attribute {name!r}")
