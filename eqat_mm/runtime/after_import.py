"""Something to do once another package's module has been imported, without importing it for that."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def after_import(module: str, then: Callable[[], object]) -> None:
    """Call `then` as soon as `module` is imported; at once where it is already."""
    if module in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Watcher(module, then))


class _Watcher(MetaPathFinder):
    """Finds one module, as others find it, and notes when it has been executed."""

    def __init__(self, module: str, then: Callable[[], object]) -> None:
        self.module, self.then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the module that is waited for."""
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
