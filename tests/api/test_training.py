"""A packed model in other people's hands: under `transformers.Trainer`, and with adapters of `peft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset

import eqat_mm
from eqat_mm.errors import ConfigError
from eqat_mm.quant.grid import as_stored
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.packed_lora import PackedLoRA
from tests.api.conftest import HELD_OUT, STEPS, WINDOWS, Seeing, logits_of
from tests.checkpoint.files import assert_four_lines, same_weights
from tests.tiny_model import Tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*these settings are", "ignore:`is_gradient_checkpointing`")


class Windows(Dataset[dict[str, Tensor]]):
    """Random windows of 12 tokens."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(2, 90, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def trained(model: Any, folder: Path, *, save: bool = False, resume: bool = False) -> transformers.Trainer:
    """Four steps under the Trainer of transformers, as its users write it."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, learning_rate=1e-3, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", disable_tqdm=True, seed=1,
        save_strategy="steps" if save else "no", save_steps=4,
    )  # fmt: skip
    callbacks = [eqat_mm.RoundStepSizes()]
    trainer = transformers.Trainer(model, arguments, train_dataset=Windows(), callbacks=callbacks)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_trainer_of_ones_own_trains_step_sizes(packed: Path, tmp_path: Path) -> None:
    model: Any = eqat_mm.load(packed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = eqat_mm.train_only(model, "scales")
    assert len(parameters) == 14
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name in before if name.endswith("weight_scale")
    }
    trainer = trained(model, tmp_path / "trainer")
    losses = [record["train_loss"] for record in trainer.state.log_history if "train_loss" in record]
    assert len(losses) == 1
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith("weight_scale")}
    for module in model.modules():
        if isinstance(module, PackedLinear):
            assert torch.equal(module.weight_scale, as_stored(module.weight_scale, module.spec))
    trainer.save_model(str(tmp_path / "mine"))
    model.save_pretrained(tmp_path / "also")
    assert torch.equal(logits_of(eqat_mm.load(tmp_path / "mine")), logits_of(model))
    assert same_weights(tmp_path / "mine", tmp_path / "also")
    assert not torch.equal(logits_of(model), logits_of(eqat_mm.load(packed)))


def test_what_was_trained_is_judged_and_tuned_on(
    tiny: Tiny, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = eqat_mm.load(packed)
    before = eqat_mm.evaluate(model, text=tiny.text, settings=HELD_OUT)
    eqat_mm.train_only(model)
    trained(model, tmp_path / "trainer")
    after = eqat_mm.evaluate(model, text=tiny.text, settings=HELD_OUT)
    assert after.perplexity != before.perplexity
    capsys.readouterr()
    given: dict[str, Any] = {"text": tiny.text, "output": tmp_path / "tuned", "settings": STEPS | WINDOWS}
    tuned = eqat_mm.tune(model, **given)
    assert f"what it is now is written to {tmp_path / 'tuned' / 'start'}" in capsys.readouterr().out
    assert torch.equal(logits_of(eqat_mm.load(tmp_path / "tuned" / "start")), logits_of(model))
    assert [stage["command"] for stage in tuned.checkpoint_origin.manifest.provenance] == [  # type: ignore[union-attr]
        "block-ap", "save_pretrained", "e2e-qp",
    ]  # fmt: skip
    eqat_mm.tune(model, **given)
    assert "already finished" in capsys.readouterr().out
    with torch.no_grad():
        next(iter(model.parameters())).add_(1.0)
    with pytest.raises(ConfigError, match="another model") as raised:
        eqat_mm.tune(model, **given)
    assert_four_lines(raised.value)


def test_parts_of_a_llava(seeing: Seeing, tmp_path: Path) -> None:
    model: Any = eqat_mm.quantize(
        seeing.folder, bits=4, group_size=32, text=seeing.text, output=tmp_path / "x", quiet=True,
        settings={"calibration": {"length": 16, "count": 4}, "fit": {"epochs": 0, "validation_samples": 1}},
    )  # fmt: skip
    for trains in ("scales", "projector", "scales+projector"):
        eqat_mm.train_only(model, trains)  # type: ignore[arg-type]
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        kinds = {"projector" if "projector" in name else name.rpartition("_")[2] for name in names}
        assert kinds == {{"scales": "scale"}.get(part, part) for part in trains.split("+")}


def test_a_trainer_goes_on_from_its_checkpoint(seeing: Seeing, tmp_path: Path) -> None:
    base = tmp_path / "x"
    settings = {"calibration": {"length": 16, "count": 4}, "fit": {"epochs": 0, "validation_samples": 1}}
    given: dict[str, Any] = {"bits": 4, "group_size": 32, "text": seeing.text, "quiet": True, "settings": settings}
    model: Any = eqat_mm.quantize(seeing.folder, output=base, **given)
    eqat_mm.train_only(model)
    trained(model, tmp_path / "trainer", save=True)
    again: Any = eqat_mm.load(base)
    eqat_mm.train_only(again)
    trained(again, tmp_path / "trainer", save=True, resume=True)  # all steps are done: it only loads
    assert torch.equal(logits_of(again), logits_of(eqat_mm.load(tmp_path / "trainer" / "checkpoint-4")))
    assert not torch.equal(logits_of(again), logits_of(eqat_mm.load(base)))


@pytest.mark.parametrize(("trains", "words"), [("norms", "--trains"), ("projector", "projector"), ("lora", "lora")])
def test_parts_that_are_not_there(packed: Path, trains: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        eqat_mm.train_only(eqat_mm.load(packed), trains)
    assert_four_lines(raised.value)


def test_a_model_that_is_not_packed(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"eqat_mm\.load"):
        eqat_mm.train_only(transformers.AutoModelForCausalLM.from_pretrained(tiny.folder))


def test_adapters_of_peft(packed: Path, tmp_path: Path) -> None:
    base = eqat_mm.load(packed)
    plain = logits_of(base)
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    layers = [module for module in model.modules() if isinstance(module, PackedLoRA)]
    assert len(layers) == 4
    assert torch.equal(logits_of(model), plain)
    trained(model, tmp_path / "trainer")
    moved = logits_of(model)
    assert not torch.equal(moved, plain)
    assert all(".lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    again: Any = peft.PeftModel.from_pretrained(eqat_mm.load(packed), str(tmp_path / "adapter"))
    assert torch.equal(logits_of(again), moved)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), plain)


def test_linears_of_full_precision_have_adapters_too(tiny: Tiny) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder)
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2
