"""Good checkpoints pass; of broken ones it is said what is broken, also where the hashes were brought up to date."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eqat_mm.checkpoint.manifest import MANIFEST, read_manifest
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json, write_json
from eqat_mm.verify.checkpoint import checkpoint_checks
from eqat_mm.verify.checks import Check
from tests.checkpoint.files import alter_config, alter_manifest, alter_tensors, reseal, shard_of
from tests.verify.conftest import Made, make

LINEAR = "model.layers.1.mlp.up_proj"
SCALE = f"{LINEAR}.weight_scale"
TEXT = "w3 w4 w5 w6 w7 w8 w9"


def looked(folder: Path, made: Made, text: str | None = None) -> dict[str, Check]:
    """What became of the checks of a checkpoint, by name."""
    return {check.name: check for check in checkpoint_checks(folder, made.base, _checkpoint_at, text)}


def _checkpoint_at(name: str) -> Path | None:
    return Path(name) / "model" if (Path(name) / "model").is_dir() else None


def failed(found: dict[str, Check]) -> dict[str, str]:
    return {name: check.said for name, check in found.items() if check.passed is False}


def alter(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change one tensor, and bring the hashes up to date."""
    alter_tensors(shard_of(folder, name), lambda held: held | {name: change(held[name])})


def test_good_checkpoints_pass(made: Made) -> None:
    names = {"manifest", "files", "others", "index", "config", "shapes", "codes", "zero points", "step sizes"}
    rounded, tuned = looked(made.rounded, made, TEXT), looked(made.tuned, made, TEXT)
    assert rounded.keys() == tuned.keys() == names | {"integers", "untouched", "logits"}
    assert [name for name, check in rounded.items() if not check.passed] == ["integers"]
    assert all(check.passed for check in tuned.values())
    assert "7 tensors byte for byte" in tuned["untouched"].said
    assert "top-1 agreement 100.0%" in tuned["logits"].said


def test_a_flipped_byte_in_any_file_is_named(altered: Made) -> None:
    for name in read_manifest(altered.rounded).files:
        path = altered.rounded / name
        before = path.read_bytes()
        middle = len(before) // 2
        path.write_bytes(before[:middle] + bytes([before[middle] ^ 4]) + before[middle + 1 :])
        assert failed(looked(altered.rounded, altered))["file"].startswith(f"{name}: altered")
        path.write_bytes(before)
    (altered.rounded / "config.json").unlink()
    assert failed(looked(altered.rounded, altered))["file"] == "config.json: missing"


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "zero"), (torch.inf, "not finite"), (torch.nan, "not finite"), (1e-12, "too small")]
)
def test_a_step_size_that_cannot_be(altered: Made, value: float, said: str) -> None:
    def change(scale: Tensor) -> Tensor:
        scale[3, 1 % scale.shape[1]] = value
        return scale

    alter(altered.rounded, SCALE, change)
    found = failed(looked(altered.rounded, altered))
    assert "config" in found or f"{LINEAR}: 1 {said}" in found["step sizes"]


def test_negative_steps_are_of_the_symmetric_grid(altered: Made) -> None:
    alter(altered.rounded, SCALE, lambda scale: -scale.abs())
    found = failed(looked(altered.rounded, altered))
    if read_manifest(altered.rounded).spec["symmetric"]:
        assert found == {}
    else:
        assert found.keys() == {"step sizes"}
        assert f"{LINEAR}: 256 too small or negative, the first at row 0, group 0" in found["step sizes"]


def test_swapped_shards_are_named(altered: Made) -> None:
    first, second, _ = sorted(altered.rounded.glob("*.safetensors"))
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    assert failed(looked(altered.rounded, altered))["file"].startswith(f"{second.name}: altered")
    reseal(altered.rounded)
    found = failed(looked(altered.rounded, altered))
    assert "model.layers.0" in found["index"]
    assert first.name in found["index"]


@pytest.mark.parametrize("field", ["bits", "symmetric", "group_size"])
def test_a_config_that_is_not_that_of_the_manifest(altered: Made, field: str) -> None:
    spec = read_manifest(altered.rounded).spec
    other = {"bits": 4, "symmetric": not spec["symmetric"], "group_size": 128}
    entry = read_json(altered.rounded / "config.json")["quantization_config"]
    entry["config_groups"]["group_0"]["weights"][{"bits": "num_bits"}.get(field, field)] = other[field]
    alter_config(altered.rounded, quantization_config=entry)
    assert "config.json" in failed(looked(altered.rounded, altered))["config"]
    alter_manifest(altered.rounded, spec=spec | {field: other[field]})
    assert "config" in failed(looked(altered.rounded, altered))


def test_a_config_with_other_sizes(altered: Made) -> None:
    alter_config(altered.rounded, num_hidden_layers=1)
    assert "model.layers.1" in failed(looked(altered.rounded, altered))["config"]


def test_a_tensor_that_was_not_to_change(altered: Made) -> None:
    alter(altered.rounded, "model.embed_tokens.weight", lambda value: value * 2)
    assert failed(looked(altered.rounded, altered)) == {"untouched": "model.embed_tokens.weight is not that of base"}


def test_norms_that_block_ap_trained_may_differ(altered: Made) -> None:
    name = "model.layers.0.input_layernorm.weight"
    alter(altered.rounded, name, lambda value: value * 2)
    assert failed(looked(altered.rounded, altered)) == {"untouched": f"{name} is not that of base"}
    alter_manifest(altered.rounded, provenance=[{"command": "block-ap", "config": {}}])
    found = looked(altered.rounded, altered)
    assert failed(found) == {}
    assert found["untouched"].said.endswith("1 trained")


def test_codes_that_are_not_those_of_the_stage_before(altered: Made) -> None:
    name = f"{LINEAR}.weight_packed"
    alter(altered.tuned, name, lambda words: words ^ torch.eye(*words.shape, dtype=torch.int32))
    found = failed(looked(altered.tuned, altered))
    assert found.keys() == {"integers"}
    assert name in found["integers"]


def test_a_shape_that_the_words_do_not_have(altered: Made) -> None:
    alter(altered.rounded, f"{LINEAR}.weight_shape", lambda shape: shape - torch.tensor([0, 1]))
    assert LINEAR in failed(looked(altered.rounded, altered))["config"]


def test_bits_behind_the_last_code(tmp_path: Path) -> None:
    """Rows of 72 codes of 3 bits end within a word."""
    made = make(tmp_path, QuantSpec(3, -1, symmetric=True), hidden_size=72)
    alter(made.rounded, f"{LINEAR}.weight_packed", lambda words: words | torch.tensor([0] * 6 + [1 << 30]).int())
    found = failed(looked(made.rounded, made))
    assert found == {"codes": f"{LINEAR}: something is in the bits behind the last one"}


def test_what_is_not_here_is_said_and_no_failure(made: Made) -> None:
    found = {check.name: check for check in checkpoint_checks(made.tuned, None, lambda _: None, None)}
    unknown = {name: check.said for name, check in found.items() if check.passed is None}
    assert unknown.keys() == {"integers", "untouched", "logits"}
    assert str(made.rounded.parent) in unknown["integers"]
    assert "--base" in unknown["untouched"]


def test_a_file_that_was_put_there_later(altered: Made) -> None:
    (altered.rounded / "chat_template.jinja").write_text("{{ messages }}")
    assert "chat_template.jinja" in failed(looked(altered.rounded, altered))["others"]


def test_a_checkpoint_of_an_older_version(altered: Made) -> None:
    manifest = read_json(altered.rounded / MANIFEST)
    write_json(altered.rounded / MANIFEST, {k: v for k, v in manifest.items() if k != "sha256"} | {"format_version": 2})
    assert "without its own hash" in looked(altered.rounded, altered)["manifest"].said
