"""Folders and models as the commands find them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from eqat_mm.commands.plumbing.models import load_model, model_folder, require_finite, require_weights
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.errors import AdapterError, CheckpointError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import write_json
from tests.checkpoint.files import assert_four_lines
from tests.tiny_model import Tiny

CPU = torch.device("cpu")


def test_a_language_model_is_loaded(tiny: Tiny) -> None:
    assert isinstance(load_model(tiny.folder, CPU), transformers.LlamaForCausalLM)


def test_the_folder_of_a_run_stands_for_its_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    rtn(RTNJob(model=str(tiny.folder), output=tmp_path / "run", quant=QuantSpec(2, 32)))
    assert model_folder(str(tmp_path / "run")) == tmp_path / "run" / "model"
    assert model_folder(str(tmp_path / "run" / "model")) == tmp_path / "run" / "model"
    assert model_folder(str(tiny.folder)) == tiny.folder


def test_a_whole_model_may_come_in(tiny: Tiny, tmp_path: Path) -> None:
    checked = require_weights(tiny.folder)
    assert checked is not None
    assert checked.left_over == []
    require_finite(checked.source)
    assert require_weights(rtn(RTNJob(model=str(tiny.folder), output=tmp_path, quant=QuantSpec(2, 32)))) is None


def test_a_value_that_is_not_finite_is_found_wherever_it_is(tiny: Tiny, tmp_path: Path) -> None:
    """The head is read last by everything that quantizes."""
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"][-1, -1] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checked = require_weights(tmp_path)
    assert checked is not None
    with pytest.raises(CheckpointError, match="1 of 6208 values"):
        require_finite(checked.source)


def test_a_llava_in_its_original_layout_is_refused(tmp_path: Path) -> None:
    """transformers would read it as a LLaVA of its own whose weights are all missing."""
    write_json(tmp_path / "config.json", {"model_type": "llava", "mm_vision_tower": "openai/clip-vit"})
    with pytest.raises(AdapterError, match="llava-hf has") as caught:
        load_model(tmp_path, CPU)
    assert_four_lines(caught.value)


def test_a_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="the folder that it lies in") as caught:
        model_folder(str(tmp_path / "model.gguf"))
    assert_four_lines(caught.value)
