"""Step sizes of a task in a small file: E2E-QP leaves the integers as they are, so this is all that a task changes.

One safetensors file: tensors by the names of the model's modules, in the dtypes of the checkpoint, and JSON in its
header, `Facts`. It fits a base whose integers, and all else that it does not bring itself, are those it was trained
over: it has their hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from eqat_mm.blocks.stored import open_safetensors
from eqat_mm.blocks.weights import is_finite
from eqat_mm.checkpoint.adapters import has_adapters, without_adapters
from eqat_mm.checkpoint.companions import PROCESSOR, files_like
from eqat_mm.checkpoint.layout import SCALE_SUFFIX
from eqat_mm.checkpoint.origin import Origin
from eqat_mm.checkpoint.write import stored_state
from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.runtime.files import atomic_path

FILE = "step_sizes.safetensors"
"""Name of the file where a folder is given."""

_FACTS, _HASH, _VERSION = "eqat_step_sizes", "sha256", 1
_SPEAKING = ("*.jinja", *PROCESSOR)
"""Files that say how a model is addressed: training on conversations may have changed them."""


@dataclass(frozen=True)
class Facts:
    """What a file of step sizes says of itself.

    Attributes:
        arch: adapter name of the model.
        spec: fields of its `QuantSpec`.
        stage: that made it, `e2e-qp`.
        source: the full-precision model.
        provenance: of every stage, first to last.
        integers: path of a packed linear -> hash of its codes and zero points.
        others: name of any other tensor that is not in the file -> hash of it as the checkpoint stores it.
        companions: name -> text of the files that say how the model is addressed.
        format_version: of these facts.
    """

    arch: str
    spec: dict[str, Any]
    stage: str
    source: str
    provenance: list[dict[str, Any]]
    integers: dict[str, str]
    others: dict[str, str]
    companions: dict[str, str]
    format_version: int = _VERSION


@dataclass(frozen=True)
class StepSizes:
    """A task: the step sizes over the integers of its base, and of a vision-language model its projector, if trained.

    Attributes:
        facts: what it says of itself.
        tensors: by their names in the model, on the CPU, as a checkpoint stores them.
    """

    facts: Facts
    tensors: dict[str, Tensor]

    @property
    def parts(self) -> list[str]:
        """What it holds beside step sizes."""
        names = {name for name in self.tensors if not name.endswith(SCALE_SUFFIX)}
        return sorted({name.rpartition(".")[0] for name in names})

    def write(self, path: Path) -> Path:
        """Write the file, at once; return its path. `path` is a `.safetensors` file, or a folder for it."""
        facts = json.dumps(asdict(self.facts), sort_keys=True)
        header = {"format": "pt", _FACTS: facts, _HASH: _hash_of(facts, self.tensors)}
        with atomic_path(file_of(path)) as temporary:
            temporary.write_bytes(save(self.tensors, header))
        return file_of(path)


def file_of(path: Path) -> Path:
    """Return the file that a path means: itself, or the one in the folder."""
    return path if path.suffix == ".safetensors" else path / FILE


def is_step_sizes(path: Path) -> bool:
    """Whether a safetensors file says that it is one of these."""
    try:
        with open_safetensors(path) as reader:
            return _FACTS in (reader.metadata() or {})
    except CheckpointError:
        return False


def read_step_sizes(path: Path) -> StepSizes:
    """Read a file of step sizes, or the one in a folder.

    Raises:
        CheckpointError: it is missing, another kind of file, or altered.
    """
    file = file_of(path)
    if not file.is_file():
        raise _refused(file, "no such file", "check the path; `eqat adapter save` writes one")
    with open_safetensors(file) as reader:
        header = reader.metadata() or {}
        tensors = {name: reader.get_tensor(name).clone() for name in reader.keys()}  # noqa: SIM118 - it is no mapping
    if _FACTS not in header:
        raise _refused(file, "a file without the facts of step sizes", "name a file that `eqat adapter save` wrote")
    if _hash_of(header[_FACTS], tensors) != header.get(_HASH):
        raise _refused(file, "other content than was written", "the file was altered: copy or save it again")
    facts = json.loads(header[_FACTS])
    if facts.keys() != {field.name for field in fields(Facts)} or facts["format_version"] != _VERSION:
        raise _refused(file, f"format version {facts.get('format_version')}", "save it again, or update eqat-mm")
    return StepSizes(Facts(**facts), tensors)


def step_sizes_of(model: PreTrainedModel, with_parts: Iterable[str] = ()) -> StepSizes:
    """Return the present step sizes of a model, and what else is to be in the file.

    Args:
        model: packed, as `load` gives it; step sizes are rounded as they are stored.
        with_parts: paths of modules whose tensors belong to the task, such as the projector.

    Raises:
        ConfigError: it has low-rank adapters, or something else was trained as well.
        CheckpointError: the checkpoint that it was loaded from is gone.
    """
    origin = origin_of(model)
    if has_adapters(model):
        do = "copy the folder adapter/ of its checkpoint: peft reads it"
        raise ConfigError("model", "a model with low-rank adapters", "one whose step sizes were trained", do)
    state = stored_state(model)
    prefixes = tuple(f"{part}." for part in with_parts)
    own = [name for name in state if name.endswith(SCALE_SUFFIX) or name.startswith(prefixes)]
    tensors = {name: state[name].detach().cpu().to(origin.dtypes[name]).contiguous() for name in own}
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise ConfigError(bad[0], "values that are not finite", "finite numbers", "train again with a smaller rate")
    manifest = origin.manifest
    facts = Facts(
        arch=manifest.arch,
        spec=manifest.spec,
        stage=manifest.stage,
        source=manifest.source,
        provenance=manifest.provenance,
        integers=integers_of(model),
        others=_unchanged_others(origin, state, set(own)),
        companions=_companions_in(origin.folder),
    )
    return StepSizes(facts, tensors)


def require_base(task: StepSizes, integers: Mapping[str, str], others: Mapping[str, str], where: str) -> None:
    """Check that step sizes were trained over these integers, with everything else as it is here.

    Args:
        task: the step sizes.
        integers: of the base, from `integers_of`.
        others: of the base, from `others_of`; empty where its files are gone.
        where: what is refused, for messages.

    Raises:
        CheckpointError: names the first layer or tensor that is another one.
    """
    what = {"integers": (task.facts.integers, integers)}
    if others:
        needed = {name: digest for name, digest in others.items() if name not in task.tensors}
        what["values"] = (task.facts.others, needed)
    for kind, (wanted, given) in what.items():
        wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        if wrong:
            more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
            raise CheckpointError(
                where=where,
                given=f"other {kind} in {wrong[0]}{more} than the step sizes were trained with",
                allowed=f"the base that they were trained over: {task.facts.arch} from {task.facts.source}",
                do="name the Block-AP checkpoint that the task started from, or a task of this one",
            )


@torch.no_grad()
def put(model: PreTrainedModel, values: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of a model, in place: no storage changes, so graphs and references stay good."""
    state = tensors_of(model)
    for name, value in values.items():
        state[name].copy_(value)


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a model by their names in it, those of low-rank adapters left out."""
    return without_adapters(model.state_dict(keep_vars=True))


def integers_of(model: PreTrainedModel) -> dict[str, str]:
    """Return a hash of codes and zero points of every packed linear, by its path."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            integers = {"codes": module.weight_packed, "zeros": module.weight_zero_point}
            kept = {leaf: tensor for leaf, tensor in integers.items() if tensor is not None}
            found[path.replace(".base_layer", "")] = _hash_of("", kept)
    return found


def others_of(model: PreTrainedModel) -> dict[str, str]:
    """Return a hash of every tensor that is not of a packed linear, as it is stored; none where the files are gone."""
    origin = origin_of(model)
    base = origin.unchanged()
    return {} if base is None else {name: _hash_of("", {"": base.read(stored)}) for stored, name in _others(origin)}


def origin_of(model: PreTrainedModel) -> Origin:
    """Return the checkpoint that a model was loaded from.

    Raises:
        ConfigError: it is no packed model.
    """
    origin = getattr(model, "checkpoint_origin", None)
    if not isinstance(origin, Origin):
        raise ConfigError("model", f"a {type(model).__name__}", "a model as `eqat_mm.load` returns it", "load one")
    return origin


def _others(origin: Origin) -> list[tuple[str, str]]:
    """Return names in files and in the model of what is not of a packed linear."""
    packed = {name.removesuffix(SCALE_SUFFIX) for name in origin.dtypes if name.endswith(SCALE_SUFFIX)}
    return [
        (stored, name)
        for names in origin.shards.values()
        for stored, name in names.items()
        if name.rpartition(".")[0] not in packed and name in origin.dtypes
    ]


def _unchanged_others(origin: Origin, state: Mapping[str, Tensor], own: set[str]) -> dict[str, str]:
    base = origin.unchanged()
    if base is None:
        do = "save the model first with save_pretrained, load it, and save its step sizes then"
        raise CheckpointError(str(origin.folder), "gone, or another checkpoint by now", "the one that was loaded", do)
    found = {}
    for stored, name in _others(origin):
        if name in own:
            continue
        there, now = base.read(stored), state[name].detach().cpu()
        if not torch.equal(there.to(now.dtype), now):
            do = "save the whole model with save_pretrained; of a projector, say that it belongs to the task"
            raise ConfigError(name, "values that were trained, too", "a model whose step sizes were trained", do)
        found[name] = _hash_of("", {"": there})
    return found


def _companions_in(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text(encoding="utf-8") for name in files_like(folder, _SPEAKING)}


def _hash_of(text: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _refused(file: Path, given: str, do: str) -> CheckpointError:
    return CheckpointError(str(file), given, "a file of step sizes", do)
