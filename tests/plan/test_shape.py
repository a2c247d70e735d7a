"""The shipped configurations have the published sizes; a packed model has the bytes that are written."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from eqat_mm.blocks.source import weight_files
from eqat_mm.commands.plumbing.shapes import model_shape
from eqat_mm.commands.verbs.quantize import rtn
from eqat_mm.errors import ConfigError
from eqat_mm.plan.models import _files, shipped_config
from eqat_mm.plan.shape import shape_of
from eqat_mm.plan.storage import checkpoint_bytes, codes, linear_bytes, scales
from eqat_mm.quant.spec import QuantSpec
from llava_adapters import arch_for, known_archs
from llava_adapters.aliases import ALIASES
from tests.commands.jobs import SPEC, rtn_job
from tests.plan.shapes import shape
from tests.tiny_model import save_tiny

PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "smollm2-135m": 134_515_008,
    "llava-1.5-7b": 7_063_427_072,
    "llava-1.5-13b": 13_351_494_656,
    "llava-1.6-34b": 34_752_083_968,
    "llava-v1.6-vicuna-7b": 7_063_431_168,
    "llava-v1.6-vicuna-13b": 13_351_499_776,
    "llava-v1.6-mistral-7b": 7_566_747_648,
    "demo-llava": 136_014_144,
    "demo-llava-mini-vqa": 135_818_432,
}


def test_every_shipped_configuration_is_listed_here() -> None:
    assert set(_files()) == set(PARAMETERS)


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_parameters_are_the_published_ones(name: str, parameters: int) -> None:
    assert shape(name).parameters == parameters


def test_the_parts_of_a_7b() -> None:
    found = shape("llama-2-7b")
    assert len(found.blocks) == 32
    assert found.largest.weights == 4 * 4096 * 4096 + 3 * 4096 * 11008 == 202_375_168
    assert found.largest.other == 2 * 4096
    assert (found.embedding, found.head, found.rest) == (131_072_000, 131_072_000, 4096)
    assert (found.hidden, found.queries, found.vocabulary, found.stored) == (4096, 4096, 32000, 2)


def test_a_tied_head_is_counted_once() -> None:
    assert shape("smollm2-135m").head == 0


def test_images_of_a_llava() -> None:
    assert (shape("llava-1.5-7b").image_tokens, shape("llava-1.5-7b").projector) == (576, 20_979_712)
    assert shape("llava-1.6-34b").image_tokens == 5 * 576
    assert shape("llama-2-7b").patches == 0


@pytest.mark.parametrize("name", sorted(known_archs()))
def test_every_adapter_has_a_shape(name: str) -> None:
    arch = arch_for(name)
    model, _ = arch.tiny()
    expected = sum(parameter.numel() for parameter in model.parameters())
    arch.split_experts(model)
    assert shape_of(model, arch).parameters == expected


@pytest.mark.parametrize(("name", "billions"), [("mixtral-8x7b", 12.9), ("qwen3-30b-a3b", 3.3)])
def test_a_token_passes_the_experts_it_is_sent_to(name: str, billions: float) -> None:
    """As published: 12.9 of 46.7 billion, 3.3 of 30.5."""
    found = shape(name)
    assert (found.passed + found.unquantized) / 1e9 == pytest.approx(billions, abs=0.06)
    assert shape("llama-2-7b").passed == shape("llama-2-7b").weights


def test_aliases_and_repositories_share_configurations() -> None:
    assert shipped_config("vicuna-13b") == shipped_config("llama-2-13b")
    assert shipped_config(ALIASES["llama-2-7b"]) == shipped_config("llama-2-7b")
    assert shipped_config("gpt-2") is None


# ---- bytes ----------------------------------------------------------------------------------------


def test_a_packed_linear() -> None:
    stored, step_sizes = linear_bytes(4096, 11008, QuantSpec(bits=3, group_size=64))
    assert step_sizes == 4096 * 172
    assert stored == 4096 * 11008 * 3 // 8 + 4096 * 172 * 3 // 8 + 16


def test_a_packed_7b() -> None:
    found, spec = shape("llama-2-7b"), QuantSpec(bits=2, group_size=64)
    groups = found.weights // 64
    assert scales(found, spec) == groups == 101_187_584
    assert codes(found, spec) == found.weights // 4 + groups // 4 + 16 * 7 * 32
    assert checkpoint_bytes(found, spec) == codes(found, spec) + 2 * groups + 2 * 262_410_240 == 2_371_497_472


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError):
        checkpoint_bytes(shape("smollm2-135m"), QuantSpec(bits=2, group_size=256))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_written_checkpoint_has_these_bytes(tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype) -> None:
    folder = tmp_path_factory.mktemp("tiny")
    tiny = save_tiny(folder, dtype=dtype)
    model = rtn(rtn_job(tiny, folder / "rtn"))
    stored = 0
    for path in weight_files(model):
        with safe_open(str(path), framework="pt") as reader:
            stored += sum(reader.get_tensor(name).nbytes for name in reader.keys())  # noqa: SIM118
    assert checkpoint_bytes(model_shape(str(tiny.folder)), SPEC) == stored
