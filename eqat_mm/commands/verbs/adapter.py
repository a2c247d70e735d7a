"""`eqat adapter`: tasks as small files of step sizes, taken from runs and put over the integers of their base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from eqat_mm.checkpoint.manifest import Manifest, checkpoint_folder
from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.step_sizes import (
    StepSizes,
    file_of,
    integers_of,
    is_step_sizes,
    origin_of,
    others_of,
    put,
    read_step_sizes,
    require_base,
    step_sizes_of,
)
from eqat_mm.checkpoint.write import save_like
from eqat_mm.commands.plumbing.runs import settings
from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.progress import say, size
from eqat_mm.runtime.provenance import provenance
from eqat_mm.runtime.room import require_writable
from eqat_mm.runtime.settings import Settings
from llava_adapters import arch_for

_PATHS = {"save": "one run, or its checkpoint", "apply": "a base and a task", "list": "files or folders of tasks"}


@dataclass(frozen=True)
class AdapterJob(Settings):
    """Step sizes of a task: saved from a run, applied to its base, listed.

    Attributes:
        action: `save RUN` writes what E2E-QP trained, `apply BASE TASK` writes the folder of a whole checkpoint, `list`
            says what files or folders hold.
        paths: what follows the action; `list` alone takes the present folder.
        output: of `save` a .safetensors file, or a folder for it; of `apply` a new folder.
    """

    action: Literal["save", "apply", "list"] = "list"
    paths: list[Path] | Path = field(default_factory=list)
    output: Path | None = None

    @property
    def named(self) -> list[Path]:
        """Every path, also where there is one."""
        return [path.expanduser() for path in (self.paths if isinstance(self.paths, list) else [self.paths])]

    def check_together(self) -> None:
        """Check that the action has what it needs.

        Raises:
            ConfigError: it has not.
        """
        few, many = {"save": (1, 1), "apply": (2, 2), "list": (0, 10**6)}[self.action]
        if not few <= len(self.named) <= many:
            given = f"{len(self.named)} paths" if self.named else "no path"
            raise ConfigError(f"eqat adapter {self.action}", given, _PATHS[self.action], "name what is meant, in order")
        if (self.output is None) != (self.action == "list"):
            given = "no --output" if self.output is None else f"--output {self.output}"
            allowed = "a place for what is written" if self.output is None else "nothing: it writes nothing"
            raise ConfigError(f"eqat adapter {self.action}", given, allowed, "give one, or leave it out")


def adapter(job: AdapterJob) -> list[Path]:
    """Save, apply or list; return what was written or found.

    Raises:
        EqatError: no run, no task, or a base that the task does not fit; before anything is written.
    """
    return list(_ACTIONS[job.action](job))


def _save(job: AdapterJob) -> Iterator[Path]:
    run, output = checkpoint_folder(job.named[0]), _output_of(job)
    require_writable(file_of(output).parent)
    model = load(run)
    manifest = origin_of(model).manifest
    projector = arch_for(manifest.arch, f"{run}: the adapter that made it").projector
    trained = projector is not None and any("projector" in _trained_by(stage) for stage in manifest.provenance)
    task = step_sizes_of(model, [projector] if trained and projector is not None else [])
    path = task.write(output)
    say(_line(path, task))
    yield path


def _trained_by(stage: dict[str, Any]) -> str:
    return str(stage.get("config", {}).get("trains", ""))


def _apply(job: AdapterJob) -> Iterator[Path]:
    base, output = checkpoint_folder(job.named[0]), _output_of(job)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError("--output", f"{output}, which is there already", "a new folder", "choose another --output")
    require_writable(output.parent)
    task, model = read_step_sizes(job.named[1]), load(base)
    require_base(task, integers_of(model), others_of(model), str(base))
    put(model, task.tensors)
    origin = origin_of(model)
    facts = task.facts
    made: Manifest = replace(origin.manifest, provenance=facts.provenance)
    vars(model)["checkpoint_origin"] = replace(origin, manifest=made)
    record = provenance("adapter apply", settings(job), 0)
    save_like(model, output, base, facts.stage, record, facts.companions)
    say(f"checkpoint: {output}")
    yield output


def _list(job: AdapterJob) -> Iterator[Path]:
    for path in job.named or [Path()]:
        found = list(_files_in(path))
        if not found:
            raise CheckpointError(str(path), "no step sizes in it", "a file that `eqat adapter save` wrote", "check it")
        for file in found:
            say(_line(file, read_step_sizes(file)))
            yield file


def _files_in(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    files = {*path.glob("*.safetensors"), *path.glob("*/*.safetensors")}
    yield from (file for file in sorted(files) if is_step_sizes(file))


def _line(path: Path, task: StepSizes) -> str:
    facts = task.facts
    layers = len(facts.integers)
    with_parts = "".join(f", {part.rpartition('.')[2] or part}" for part in task.parts)
    of = f"{facts.arch} {QuantSpec(**facts.spec).name} from {facts.source}"
    return f"{path}: {facts.stage}, {of}, {layers} linears{with_parts}, {size(path.stat().st_size)}"


def _output_of(job: AdapterJob) -> Path:
    assert job.output is not None
    return job.output.expanduser()


_ACTIONS: dict[str, Callable[[AdapterJob], Iterator[Path]]] = {"save": _save, "apply": _apply, "list": _list}
