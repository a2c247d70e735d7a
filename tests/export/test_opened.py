"""A checkpoint as exporters see it: the same numbers as the loaded model has, each name in one shard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eqat_mm.checkpoint import load
from eqat_mm.errors import ExportError
from eqat_mm.export.exact import Change, change_of, require_exact, require_weights_alone
from eqat_mm.export.form import format_called
from eqat_mm.export.opened import open_packed
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from tests.commands.jobs import llm_qat_job
from tests.export.made import packed, packed_llava
from tests.tiny_model import save_tiny


@pytest.mark.parametrize("spec", [QuantSpec(2, 32), QuantSpec(3, 64), QuantSpec(8, -1, symmetric=True)])
def test_as_loaded(spec: QuantSpec, tmp_path: Path) -> None:
    folder = packed(tmp_path, spec, attention_bias=True)
    model, loaded = open_packed(folder), load(folder)
    linears = {name: one for name, one in loaded.named_modules() if isinstance(one, PackedLinear)}
    assert model.weights.keys() == linears.keys()
    for name, weight in model.weights.items():
        assert torch.equal(weight.dense(), linears[name].dequantize())
        groups = weight.codes().float().unflatten(1, (-1, weight.group_size)) - weight.zero_points().unsqueeze(-1)
        assert torch.equal((groups * weight.scale().float().unsqueeze(-1)).flatten(1), weight.dense())
    rest = {name for name in loaded.state_dict() if ".weight_" not in name}
    assert set(model.others) == rest


def test_shards_have_each_name_once(tmp_path: Path) -> None:
    model = open_packed(packed_llava(tmp_path, QuantSpec(4, 32)))
    shards = list(model.shards())
    assert len(shards) == 3  # a block each, and the rest
    names = [name for shard in shards for name in shard]
    assert sorted(names) == sorted([*model.weights, *model.others])
    assert model.published_name("model.language_model.layers.0.mlp.up_proj").endswith("layers.0.mlp.up_proj")


def test_weights_alone(tmp_path: Path) -> None:
    from eqat_mm.commands.verbs.llm_qat import llm_qat

    model = open_packed(llm_qat(llm_qat_job(save_tiny(tmp_path), tmp_path / "run", max_steps=1)))
    with pytest.raises(ExportError, match="activations or KV cache of 4-8-4"):
        require_weights_alone(model, format_called("gguf"))


def test_a_change_is_counted_in_weights(tmp_path: Path) -> None:
    model, form = open_packed(packed(tmp_path, QuantSpec(4, 32))), format_called("gguf")
    change = change_of(model, form)
    differ = sum(int((form.held(weight) != weight.dense()).sum()) for weight in model.weights.values())
    assert 0 < differ <= change.weights < change.total
    with pytest.raises(ExportError, match=f"{change.weights:,} of {change.total:,}"):
        require_exact(model, form, change, lossy=False)
    require_exact(model, form, change, lossy=True)
    require_exact(model, form, Change(0, change.total, 0), lossy=False)
