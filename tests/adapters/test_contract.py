"""What every registered adapter must fulfil; a new one is tested here without further code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from eqat_mm.blocks.arch import Arch, Inputs
from eqat_mm.blocks.capture import Sample
from eqat_mm.blocks.source import OpenModel, WeightSource, module_names, open_model
from eqat_mm.blocks.walker import BlockStep, BlockWalker, capture_front
from eqat_mm.checkpoint.layout import PACKED_SUFFIX
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for, known_archs
from llava_adapters.tiny import IMAGE_TOKEN, tiny_llava, tiny_llava_next
from tests.checkpoint.files import same_bytes
from tests.tolerances import assert_close

CPU = torch.device("cpu")
CASES = known_archs() | {
    "llava, mistral tower": replace(arch_for("llava"), tiny=lambda: tiny_llava("mistral")),
    "llava, tied head": replace(arch_for("llava"), tiny=lambda: tiny_llava("llama", tie_word_embeddings=True)),
    "llava_next, llama tower": replace(arch_for("llava_next"), tiny=lambda: tiny_llava_next("llama")),
}


@dataclass
class Case:
    """One adapter with its tiny model saved to a folder."""

    arch: Arch
    folder: Path
    batches: list[Inputs]
    linears: int = field(init=False)

    def __post_init__(self) -> None:
        self.linears = len(self.arch.linears)

    def open(self) -> OpenModel:
        return open_model(self.folder, self.arch)

    def really_load(self) -> nn.Module:
        auto = getattr(transformers, self.arch.auto_class)
        model: nn.Module = auto.from_pretrained(self.folder, dtype=torch.float32)
        return model.eval()


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    arch = CASES[request.param]
    model, batches = arch.tiny()
    folder = tmp_path_factory.mktemp(arch.name)
    model.save_pretrained(folder)  # type: ignore[operator]
    return Case(arch, folder, batches)


@dataclass
class Call:
    """Input and output of one call of a module."""

    name: str
    input: Tensor
    output: Tensor


@torch.no_grad()
def calls_of(modules: dict[str, nn.Module], run: nn.Module, *args: Any, **kwargs: Any) -> list[Call]:
    """Run a module and return the calls of some modules in it, in order."""
    calls: list[Call] = []
    handles = []
    for name, module in modules.items():

        def record(_: nn.Module, inputs: Any, named: Any, output: Any, name: str = name) -> None:
            first = inputs[0] if inputs else next(iter(named.values()))
            calls.append(Call(name, first.clone(), (output[0] if isinstance(output, tuple) else output).clone()))

        handles.append(module.register_forward_hook(record, with_kwargs=True))
    try:
        run(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def block_outputs(case: Case, inputs: Inputs) -> list[Tensor]:
    """Return the hidden states after every block in the model's own forward."""
    model = case.really_load()
    blocks = {str(index): block for index, block in enumerate(case.arch.find_blocks(model))}
    return [call.output for call in calls_of(blocks, model, **inputs, use_cache=False)]


def walk(case: Case, batches: list[Inputs], batch_tokens: int) -> Iterator[tuple[OpenModel, BlockStep]]:
    """Yield every step after both streams have passed its block."""
    opened = case.open()
    walker = BlockWalker(opened, capture_front(opened, batches, torch.float32), device=CPU, batch_tokens=batch_tokens)
    for step in walker.walk():
        walker.advance_fp(step)
        walker.advance_quantized(step)
        yield opened, step


def test_declared_paths_resolve(case: Case) -> None:
    opened = case.open()
    assert len(opened.blocks) >= 2
    parts = case.arch.full_precision_parts(opened.model)
    assert len(parts) == len(case.arch.full_precision)
    assert len(set(case.arch.linears)) == case.linears


def test_every_linear_of_a_block_is_declared(case: Case) -> None:
    for block in case.open().blocks:
        linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert linears == {*case.arch.linears_of(block), *(path for path in case.arch.kept if path in linears)}


def test_declared_parts_are_the_whole_model(case: Case) -> None:
    parts = tuple(f"{path}." for path in (*case.arch.full_precision, case.arch.blocks))
    names = [name for name, _ in case.open().model.named_parameters()]
    assert [name for name in names if not f"{name}.".startswith(parts)] == []


def test_a_projector_is_a_part_that_only_vision_language_models_have(case: Case) -> None:
    has_images = case.arch.auto_class == "AutoModelForImageTextToText"
    assert (case.arch.find_projector(case.open().model) is not None) is has_images
    assert not has_images or case.arch.projector in case.arch.full_precision


def test_the_batches_cover_padding_on_both_sides(case: Case) -> None:
    masks = [batch.get("attention_mask") for batch in case.batches]
    padded = [mask for mask in masks if mask is not None and not mask.bool().all()]
    assert len(padded) < len(masks)
    assert any((mask[:, 0] == 0).any() for mask in padded)
    assert any((mask[:, -1] == 0).any() for mask in padded)


def test_samples_of_a_vision_language_model_differ_in_images(case: Case) -> None:
    with_images = [batch["input_ids"] for batch in case.batches if "pixel_values" in batch]
    if case.arch.auto_class == "AutoModelForCausalLM":
        assert with_images == []
        return
    assert 0 < len(with_images) < len(case.batches)
    for tokens in with_images:
        counts = (tokens == IMAGE_TOKEN).sum(1).tolist()
        assert 0 in counts
        assert len(set(counts)) == len(counts)


def test_chained_blocks_equal_the_models_own_forward(case: Case) -> None:
    for inputs in case.batches:
        expected = block_outputs(case, inputs)
        for _, step in walk(case, [inputs], batch_tokens=1):
            assert torch.equal(step.fp.read(0), expected[step.index])
            assert torch.equal(step.quantized.read(0), expected[step.index])


def test_samples_in_one_batch_give_what_they_give_alone(case: Case) -> None:
    expected = [block_outputs(case, inputs) for inputs in case.batches]
    for _, step in walk(case, case.batches, batch_tokens=4096):
        for index, alone in enumerate(expected):
            assert_close(step.fp.read(index), alone[step.index], "block")


def test_one_block_is_in_memory_at_a_time(case: Case) -> None:
    opened = case.open()
    blocks = f"{case.arch.blocks}."
    assert real_parameters(opened.model) == []

    def samples() -> Iterator[Sample]:
        for sample in capture_front(opened, case.batches, torch.float32):
            assert not [name for name in real_parameters(opened.model) if name.startswith(blocks)]
            yield sample

    walker = BlockWalker(opened, samples(), device=CPU)
    assert real_parameters(opened.model) == []
    for step in walker.walk():
        real = real_parameters(opened.model)
        assert real == [f"{step.name}.{name}" for name, _ in step.block.named_parameters()]
    assert real_parameters(opened.model) == []


def real_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that hold numbers of their own: no stand-ins, which are one number, expanded."""
    parameters = ((name, parameter) for name, parameter in model.named_parameters() if not parameter.is_meta)
    return [name for name, parameter in parameters if parameter.untyped_storage().nbytes() >= parameter.nbytes]


@pytest.fixture
def block_calls(case: Case) -> list[Call]:
    """Calls of the linears and of the modules behind their sums in block 0, and of the block itself."""
    model = case.really_load()
    block = case.arch.find_blocks(model)[0]
    paths = {*case.arch.linears, *(path for _, path in case.arch.sums)} - {""}
    modules = {path: case.arch.find(block, path) for path in sorted(paths)}
    return calls_of({**modules, "": block}, model, **case.batches[0], use_cache=False)


def test_stages_are_in_the_order_data_passes_and_share_their_input(case: Case, block_calls: list[Call]) -> None:
    order = [call.name for call in block_calls if call.name in case.arch.linears]
    assert sorted(order) == sorted(case.arch.linears)
    inputs = {call.name: call.input for call in block_calls}
    at = 0
    for stage in case.arch.stages:
        assert set(order[at : at + len(stage)]) == set(stage)
        assert all(torch.equal(inputs[path], inputs[stage[0]]) for path in stage)
        at += len(stage)


def test_declared_sums_move_with_their_linear(case: Case, block_calls: list[Call]) -> None:
    model = case.really_load()
    block = case.arch.find_blocks(model)[0]
    for linear, module in case.arch.sums:
        shift = torch.full((), 0.25)
        handle = case.arch.find(block, linear).register_forward_hook(lambda _, __, output, shift=shift: output + shift)
        moved = calls_of({module: case.arch.find(block, module)}, model, **case.batches[0], use_cache=False)[0]
        handle.remove()
        still = next(call for call in block_calls if call.name == module)
        before, after = (still.output, moved.output) if module == "" else (still.input, moved.input)
        assert_close(after, before + shift, "block")


def test_a_checkpoint_keeps_what_is_not_quantized_byte_for_byte(case: Case, tmp_path: Path) -> None:
    model, _ = case.arch.tiny()
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(tmp_path / "full")  # type: ignore[operator]
    opened = open_model(tmp_path / "full", case.arch)
    stored = {i: case.arch.linears_of(block) for i, block in enumerate(opened.blocks)}
    manifest = run_rtn(opened, QuantSpec(bits=2, group_size=32), tmp_path, source="tiny", provenance={})
    written = WeightSource(tmp_path / "model", module_names(opened.model))  # type: ignore[arg-type]
    packed = {name.removesuffix(PACKED_SUFFIX) for name in written.names() if name.endswith(PACKED_SUFFIX)}
    assert packed == {f"{case.arch.blocks}.{i}.{path}" for i, paths in stored.items() for path in paths}
    assert manifest.arch == case.arch.name
    kept = [name for name in opened.source.names() if name.removesuffix(".weight") not in packed]
    assert any(name.startswith(case.arch.blocks) for name in kept)
    for name in kept:
        assert same_bytes(opened.source.read(name), written.read(name))
        assert opened.source.stored_name(name) == written.stored_name(name)
    assert not {f"{path}.weight" for path in packed} & set(written.names())
