"""What an adapter declares about an architecture: data only, no forward of its own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from eqat_mm.blocks.experts import split_experts
from eqat_mm.errors import AdapterError
from eqat_mm.quant.smooth import NormedLinears

Inputs = dict[str, Tensor]
"""Keyword arguments of one model forward, batch first."""


Stage = tuple[str, ...]
"""Paths inside a block of linears that read the same input."""

EXPERT = "*"
"""Stands, in a path, for the number of each expert of a block."""


class Round(NamedTuple):
    """Stages whose inputs one forward of a block shows: a stage, or the stages of all experts that are alike.

    Attributes:
        stages: of one block.
        experts: path of the module that sends tokens to these stages; None where all tokens pass them.
    """

    stages: tuple[Stage, ...]
    experts: str | None = None


class Part(NamedTuple):
    """A part of a model that stays in full precision.

    Attributes:
        path: of the module in the model.
        module: the module.
        whole: it belongs to the part with everything below it; otherwise only the parameters it holds itself.
    """

    path: str
    module: nn.Module
    whole: bool


@dataclass(frozen=True)
class Arch:
    """One architecture as the walker sees it.

    Attributes:
        name: short name, as in `--adapter`.
        model_types: values of `model_type` in a Hugging Face config.json that it serves.
        auto_class: transformers class that builds the model from its config.
        blocks: exact path of the `ModuleList` of decoder blocks.
        stages: paths inside one block of the linears that are quantized, in the order data passes them;
            linears of one stage read the same input and are fused by serving engines. Of blocks of several kinds each
            has those that it has, and a model may lack whole stages. `*` stands for the number of an expert: what is
            before it is the module in which transformers merges them.
        kept: paths inside one block of the modules with weights that stay in full precision, such as routers.
        sums: (path of a linear, path of a module) pairs: the linear's output is added to the residual stream, and the
            sum is the module's input; an empty path stands for the block's output.
        full_precision: exact paths of the modules, and of the parameters outside them, that are never quantized;
            with the blocks they are the whole model.
        norms: (path of a module, path of a linear) pairs: the module is a norm, and what it gives is the input of the
            linear's stage, and of nothing else.
        tiny: returns a small random model and batches of inputs, for tests.
        projector: exact path of the module that turns image features into hidden states, in vision-language models;
            the one full-precision part that can be trained.
        processor: of a vision-language model, returns a processor that fits `tiny`; None leaves out the checks with it.
    """

    name: str
    model_types: tuple[str, ...]
    auto_class: Literal["AutoModelForCausalLM", "AutoModelForImageTextToText"]
    blocks: str
    stages: tuple[tuple[str, ...], ...]
    full_precision: tuple[str, ...]
    tiny: Callable[[], tuple[nn.Module, list[Inputs]]]
    kept: tuple[str, ...] = ()
    sums: tuple[tuple[str, str], ...] = ()
    norms: tuple[tuple[str, str], ...] = ()
    projector: str | None = None
    processor: Callable[[], Any] | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of all quantized linears as they are declared, of blocks of all kinds."""
        return tuple(path for stage in self.stages for path in stage)

    def block_name(self, index: int) -> str:
        """Return the name of a block from the list of blocks on, `layers.0`: the same in every class of the model."""
        return f"{self.blocks.rpartition('.')[2]}.{index}"

    def rounds_of(self, block: nn.Module) -> tuple[Round, ...]:
        """Return the stages of one block by what can be seen at once: of the declared linears those that it has."""
        names = {name for name, _ in block.named_modules()}
        rounds = (_round(stage, names) for stage in self.stages)
        return tuple(one for one in rounds if one.stages)

    def stages_of(self, block: nn.Module) -> tuple[Stage, ...]:
        """Return the stages of one block, one for each expert."""
        return tuple(stage for one in self.rounds_of(block) for stage in one.stages)

    def linears_of(self, block: nn.Module) -> tuple[str, ...]:
        """Return the paths of the quantized linears of one block."""
        return tuple(path for stage in self.stages_of(block) for path in stage)

    def split_experts(self, model: nn.Module) -> None:
        """Replace the merged experts of `model` that are to be quantized by linears, in place; see `blocks.experts`.

        Raises:
            AdapterError: a declared path does not exist, or experts that cannot be split.
        """
        paths = {path.partition(f".{EXPERT}")[0] for path in self.linears if EXPERT in path}
        if paths:
            for index, _ in enumerate(self.find(model, self.blocks).children()):
                split_experts(model, (f"{self.blocks}.{index}.{path}" for path in sorted(paths)))

    def find_blocks(self, model: nn.Module) -> nn.ModuleList:
        """Return the decoder blocks of `model`.

        Raises:
            AdapterError: a declared path does not exist or is not what it should be, or a parameter is in no part.
        """
        blocks: nn.Module = self.find(model, self.blocks)
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            raise AdapterError(
                where=f"adapter {self.name}: blocks={self.blocks!r}",
                given=f"{type(blocks).__name__} with {len(list(blocks.children()))} children",
                allowed="a ModuleList with at least one decoder block",
                do="correct the path of the decoder blocks in the adapter",
            )
        for index, block in enumerate(blocks):
            self._require_linears(block, index, self.linears_of(block))
        self._require_quantized([*(linear for linear, _ in self.sums), *(linear for _, linear in self.norms)])
        self._require_every_parameter(model)
        return blocks

    def find_projector(self, model: nn.Module) -> nn.Module | None:
        """Return the projector of a vision-language model, None of a language model.

        Raises:
            AdapterError: the declared path does not exist.
        """
        return None if self.projector is None else self.find(model, self.projector)

    def full_precision_parts(self, model: nn.Module) -> list[Part]:
        """Return the parts that are never quantized; a parameter counts as a part of the module that holds it.

        Raises:
            AdapterError: a declared path does not exist.
        """
        parameters = dict(model.named_parameters())
        parts = []
        for path in self.full_precision:
            whole = path not in parameters
            owner = path if whole else path.rpartition(".")[0]
            parts.append(Part(owner, self.find(model, owner), whole))
        return parts

    def find(self, root: nn.Module, path: str) -> nn.Module:
        """Return the submodule at exactly `path`.

        Raises:
            AdapterError: no such module; lists near names.
        """
        names: dict[str, nn.Module] = dict(root.named_modules())
        if path in names:
            return names[path]
        near = difflib.get_close_matches(path, names, n=4, cutoff=0.4)
        raise AdapterError(
            where=f"adapter {self.name}: module {path!r} of {type(root).__name__}",
            given="no module of that name",
            allowed=", ".join(near) if near else "one of model.named_modules()",
            do="correct the path in the adapter, or choose another adapter with --adapter",
        )

    def named_linears(self, block: nn.Module) -> list[tuple[str, nn.Linear]]:
        """Return (path inside the block, module) of every linear to be quantized, in the order data passes them."""
        pairs = []
        for path in self.linears_of(block):
            module = block.get_submodule(path)
            assert isinstance(module, nn.Linear), f"{path} is a {type(module).__name__}"
            pairs.append((path, module))
        return pairs

    def normed_stages(self, model: nn.Module) -> list[NormedLinears]:
        """Return every norm whose output only quantized linears read, with these linears, block by block.

        Raises:
            AdapterError: a declared path does not exist.
        """
        found = []
        for index, block in enumerate(self.find_blocks(model)):
            linears = dict(self.named_linears(block))
            for path, linear in self.norms:
                stage = next(stage for stage in self.stages if linear in stage)
                reading = [linears[each] for mine in _round(stage, linears.keys()).stages for each in mine]
                if reading:
                    found.append(NormedLinears(f"{self.blocks}.{index}.{path}", self.find(block, path), reading))
        return found

    def _require_quantized(self, paths: list[str]) -> None:
        """Check that what `sums` and `norms` call a quantized linear is one."""
        wrong = [path for path in paths if path not in self.linears]
        if wrong:
            raise AdapterError(
                where=f"adapter {self.name}: {wrong[0]!r} in sums or norms",
                given="no linear of its stages",
                allowed=", ".join(difflib.get_close_matches(wrong[0], self.linears) or self.linears),
                do="correct the path in the adapter",
            )

    def _require_every_parameter(self, model: nn.Module) -> None:
        inside = {self.blocks, *(part.path for part in self.full_precision_parts(model) if part.whole)}
        prefixes = tuple(f"{path}." for path in inside)
        names = [name for name, _ in model.named_parameters()]
        missed = [name for name in names if not name.startswith(prefixes) and name not in self.full_precision]
        if missed:
            raise AdapterError(
                where=f"adapter {self.name}: {', '.join(missed[:3])} of {type(model).__name__}",
                given=f"{len(missed)} parameters that are in no declared part",
                allowed="every parameter in a decoder block or in a full-precision part",
                do="list what holds them under full_precision in the adapter, or choose another one with --adapter",
            )

    def _require_linears(self, block: nn.Module, index: int, mine: Stage) -> None:
        """Check that what is declared is linear, and that every linear is declared."""
        where, modules = f"adapter {self.name}: {self.blocks}.{index}", dict(block.named_modules())
        for path in (path for path in mine if not isinstance(modules[path], nn.Linear)):
            raise AdapterError(
                where=f"{where}.{path}",
                given=type(modules[path]).__name__,
                allowed="a linear layer",
                do="list only linear layers in the adapter's stages",
            )
        linears = (path for path, module in modules.items() if isinstance(module, nn.Linear))
        left = [path for path in linears if path not in mine and path not in self.kept]
        if left or not mine:
            for path in (path for path in self.linears if path not in mine and EXPERT not in path):
                if not left or difflib.get_close_matches(path, left, n=1, cutoff=0.7):
                    self.find(block, path)  # which is an error that lists near names
        if left:
            raise AdapterError(
                where=f"{where}.{left[0]}",
                given="a linear layer that the adapter does not mention",
                allowed="every linear layer of a block in `stages` (quantized) or in `kept` (full precision)",
                do="list it in one of the two (docs/adding_a_model.md)",
            )
        for path in (path for pair in self.sums if pair[0] in mine for path in pair):
            self.find(block, path)


def _round(stage: Stage, names: Set[str]) -> Round:
    """Return what a block with modules of these names has of a declared stage."""
    experts, star, _ = stage[0].partition(f".{EXPERT}.")
    if not star:
        own = tuple(path for path in stage if path in names)
        return Round((own,) if own else ())
    inside = (name.removeprefix(f"{experts}.").partition(".")[0] for name in names if name.startswith(f"{experts}."))
    numbers = sorted({int(number) for number in inside if number.isdecimal()})
    each = [tuple(path.replace(EXPERT, str(number)) for path in stage) for number in numbers]
    theirs = [tuple(path for path in paths if path in names) for paths in each]
    return Round(tuple(paths for paths in theirs if paths), experts)


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the submodule at `path`."""
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
