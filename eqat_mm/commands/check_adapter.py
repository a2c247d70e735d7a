"""`eqat check-adapter`: does an adapter fulfil its contract?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from eqat_mm.blocks.arch import Arch
from eqat_mm.contract import Outcome, outcomes
from eqat_mm.contract.checks import reason_of
from eqat_mm.errors import AdapterError
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.settings import Settings
from llava_adapters import arch_for, known_archs
from llava_adapters.registry import GROUP


@dataclass(frozen=True)
class CheckAdapterJob(Settings):
    """Try an adapter on a tiny model of its kind.

    Attributes:
        adapter: name of one that is installed, a Python file that holds one, or `package.module:NAME`; null tries all
            that are installed.
    """

    adapter: str | None = None


def check_adapter(job: CheckAdapterJob) -> dict[str, list[Outcome]]:
    """Print a line for every check; return what became of them, by the name of the adapter.

    Raises:
        AdapterError: there is no such adapter, or some check does not hold.
    """
    archs = known_archs().values() if job.adapter is None else [_named(job.adapter)]
    found = {arch.name: _tried(arch) for arch in archs}
    _require_all(found)
    return found


def _tried(arch: Arch) -> list[Outcome]:
    say(f"{arch.name}: {len(arch.linears)} linears in {len(arch.stages)} stages of {arch.blocks}")
    done: list[Outcome] = []
    told: set[str] = set()
    with TemporaryDirectory() as folder:
        for outcome in outcomes(arch, Path(folder)):
            say(_line(outcome, told))
            done.append(outcome)
    return done


def _line(outcome: Outcome, told: set[str]) -> str:
    """Return what is printed of an outcome; `told` are reasons that were given before."""
    if outcome.error is not None:
        reason = reason_of(outcome.error)
        shown = "for a reason that is given above" if reason in told else reason
        told.add(reason)
        return f"  FAIL  {outcome.says}\n        {shown}"
    return f"  ok    {outcome.says}" if outcome.not_here is None else f"  -     {outcome.says} ({outcome.not_here})"


def _require_all(found: dict[str, list[Outcome]]) -> None:
    broken = {name: sum(each.error is not None for each in done) for name, done in found.items()}
    for name, count in broken.items():
        if count:
            raise AdapterError(
                where=f"eqat check-adapter {name}",
                given=f"{count} of {len(found[name])} checks failed",
                allowed="an adapter for which all hold",
                do="mend what the lines with FAIL say; docs/adding_a_model.md explains the fields",
            )


def _named(adapter: str) -> Arch:
    """Return the adapter that a user names.

    Raises:
        AdapterError: there is none, or what is there cannot be imported or is none.
    """
    if adapter.endswith(".py"):
        return _only(_archs_in(_imported(Path(adapter))), adapter)
    if ":" in adapter:
        return _only([_loaded(adapter)], adapter)
    return arch_for(adapter, "eqat check-adapter")


def _imported(path: Path) -> ModuleType:
    if not path.is_file():
        raise AdapterError(str(path), "no such file", "a Python file with an `Arch`", "check the path")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _not_imported(str(path), error) from error
    return module


def _loaded(value: str) -> object:
    try:
        return EntryPoint("adapter", value, GROUP).load()
    except Exception as error:
        raise _not_imported(value, error) from error


def _not_imported(where: str, error: Exception) -> AdapterError:
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return AdapterError(where, said, "Python code that can be imported", "mend it, or install what it imports")


def _archs_in(module: ModuleType) -> list[object]:
    """Return what a module calls ARCH or ADAPTER, otherwise every adapter in it."""
    named = [vars(module)[name] for name in ("ARCH", "ADAPTER") if name in vars(module)]
    return named or [value for value in vars(module).values() if isinstance(value, Arch)]


def _only(found: Sequence[object], where: str) -> Arch:
    if len(found) == 1 and isinstance(found[0], Arch):
        return found[0]
    kinds = ", ".join(type(each).__name__ for each in found) or "nothing"
    raise AdapterError(where, kinds, "one instance of eqat_mm.blocks.Arch, as ARCH", "see docs/adding_a_model.md")
