"""The linear layer that is stored: names, shapes and dtypes of its tensors, and what survives the disk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eqat_mm.errors import ConfigError
from eqat_mm.quant import PackedLinear, QuantSpec
from tests.quant.problems import SPECS
from tests.tolerances import assert_close

ROWS = [1, 9, 64]
"""Output rows; few rows leave a single word of packed zero points."""


def random_packed(spec: QuantSpec, out_features: int = 9, in_features: int = 192, *, bias: bool = True) -> PackedLinear:
    groups = in_features // spec.group_of(in_features, "layer")
    codes = torch.randint(0, spec.top + 1, (out_features, in_features), dtype=torch.uint8)
    scale = torch.randn(out_features, groups) if spec.symmetric else torch.rand(out_features, groups) + 0.1
    zero = torch.randint(0, spec.top + 1, (out_features, groups)).float()
    return PackedLinear.from_codes(codes, scale, zero, torch.randn(out_features) if bias else None, spec)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_state_dict_is_the_documented_one(spec: QuantSpec, rows: int, bias: bool) -> None:
    groups = 192 // spec.group_of(192, "layer")
    expected = {
        "weight_packed": (torch.int32, (rows, 192 * spec.bits // 32)),
        "weight_shape": (torch.int64, (2,)),
        "weight_scale": (torch.float32, (rows, groups)),
    }
    if not spec.symmetric:
        expected["weight_zero_point"] = (torch.int32, (-(-rows * spec.bits // 32), groups))
    if bias:
        expected["bias"] = (torch.float32, (rows,))
    for packed in (PackedLinear(192, rows, spec, bias=bias), random_packed(spec, rows, bias=bias)):
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.state_dict().items()}
        assert found == expected
        assert packed.weight_shape.tolist() == [rows, 192]
        assert all(tensor.is_contiguous() for tensor in packed.state_dict().values())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_loaded_layer_is_the_saved_one(spec: QuantSpec, rows: int) -> None:
    saved, loaded = random_packed(spec, rows), PackedLinear(192, rows, spec, bias=True)
    state = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    state["weight_scale"] = state["weight_scale"].to(spec.storage_dtype)
    loaded.load_state_dict(state)
    x = torch.randn(2, 3, 192)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.weight_scale.dtype is torch.float32
    assert torch.equal(loaded(x), saved(x))
    assert torch.equal(loaded.dequantize(), saved.dequantize())


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_a_layer_of_the_other_kind_is_refused(symmetric: bool) -> None:
    saved = random_packed(QuantSpec(2, 32, symmetric))
    with pytest.raises(RuntimeError, match="weight_zero_point"):
        PackedLinear(192, 9, QuantSpec(2, 32, not symmetric), bias=True).load_state_dict(saved.state_dict())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_codes_come_back_as_weights(spec: QuantSpec, rows: int) -> None:
    groups = 192 // spec.group_of(192, "layer")
    codes = torch.randint(0, spec.top + 1, (rows, 192), dtype=torch.uint8)
    scale = (torch.rand(rows, groups) + 0.1).to(spec.storage_dtype).float()
    zero = torch.full((rows, groups), float(spec.middle)) if spec.symmetric else torch.rand(rows, groups) * spec.top
    packed = PackedLinear.from_codes(codes, scale, zero, None, spec)
    expected = (codes.unflatten(1, (groups, -1)) - zero.round().unsqueeze(-1)) * scale.unsqueeze(-1)
    assert torch.equal(packed.dequantize(), expected.flatten(1))


@pytest.mark.parametrize(("scale_dtype", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_step_sizes_are_rounded_as_they_are_stored(scale_dtype: str, dtype: torch.dtype) -> None:
    spec = QuantSpec(2, 32, scale_dtype=scale_dtype)  # type: ignore[arg-type]
    scale, zero = torch.rand(9, 6) + 0.1, torch.ones(9, 6)
    packed = PackedLinear.from_codes(torch.zeros(9, 192, dtype=torch.uint8), scale, zero, None, spec)
    assert packed.weight_scale.dtype is torch.float32
    assert torch.equal(packed.weight_scale, scale.to(dtype).float())
    assert not torch.equal(packed.weight_scale, scale)

    with torch.no_grad():
        packed.weight_scale.copy_(scale)
    packed.round_scales()
    assert torch.equal(packed.weight_scale, scale.to(dtype).float())
    assert packed.weight_scale.requires_grad


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_only_the_step_sizes_are_trained(spec: QuantSpec) -> None:
    packed = random_packed(spec)
    assert [id(p) for p in packed.scale_parameters()] == [id(packed.weight_scale)]
    assert [name for name, _ in packed.named_parameters()] == ["weight_scale"]
    before = {name: tensor.clone() for name, tensor in packed.named_buffers()}
    optimizer = torch.optim.SGD(packed.scale_parameters(), lr=0.1)
    packed(torch.randn(5, 192)).square().mean().backward()
    optimizer.step()
    for name, tensor in packed.named_buffers():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_forward_is_the_dense_one(spec: QuantSpec, bias: bool) -> None:
    packed, x = random_packed(spec, bias=bias), torch.randn(2, 3, 192)
    dense_bias: Tensor | None = None if packed.bias is None else packed.bias.double()
    expected = nn.functional.linear(x.double(), packed.dequantize(torch.float64), dense_bias)
    assert_close(packed(x), expected, "matmul")


def test_a_new_layer_computes_its_bias() -> None:
    packed = PackedLinear(64, 5, QuantSpec(2, 32), bias=True)
    assert not packed(torch.randn(3, 64)).any()


def test_a_group_that_does_not_divide_names_the_layer() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.k_proj"):
        PackedLinear(80, 4, QuantSpec(2, 32), layer="layers.0.k_proj")


def test_it_prints_its_shape_and_spec() -> None:
    assert "192, 9, w2g32sym" in repr(random_packed(QuantSpec(2, 32, symmetric=True)))
