"""Training gives the same losses on every implementation, within the table's tolerance for a block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eqat_kernels import cpu_library, use
from eqat_mm.quant.convert import to_fake, to_packed
from eqat_mm.quant.init import initial_grid
from eqat_mm.quant.spec import QuantSpec
from tests.tolerances import assert_close

STEPS = 5


def losses(spec: QuantSpec, *, packed: bool) -> torch.Tensor:
    """Fit two layers, fake-quantized (Block-AP) or packed (E2E-QP), to their full-precision selves."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    x = torch.randn(40, 64)
    with torch.no_grad():
        target = dense(x)
    model = nn.Sequential(*dense)
    for index in (0, 2):
        layer = dense[index]
        assert isinstance(layer, nn.Linear)
        fake = to_fake(layer, initial_grid(layer.weight, spec, layer=str(index), init="minmax"), spec)
        model[index] = to_packed(fake) if packed else fake
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("packed", [False, True], ids=["block-ap", "e2e-qp"])
@pytest.mark.parametrize("spec", [QuantSpec(2, 32), QuantSpec(3, -1, symmetric=True)], ids=lambda spec: spec.name)
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_losses_are_those_of_the_reference(impl: str, spec: QuantSpec, packed: bool) -> None:
    if impl == "cpu" and cpu_library.obstacle():
        pytest.skip(str(cpu_library.obstacle()))
    if impl == "triton":
        pytest.importorskip("triton")
    with use("reference"):
        expected = losses(spec, packed=packed)
    assert expected[-1] < expected[0]
    with use(impl):
        assert_close(losses(spec, packed=packed), expected, "block")
