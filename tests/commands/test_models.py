"""Folders and models as the commands find them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from eqat_mm.commands.models import load_model, model_folder
from eqat_mm.commands.quantize import RTNJob, rtn
from eqat_mm.errors import AdapterError
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


def test_a_llava_in_its_original_layout_is_refused(tmp_path: Path) -> None:
    """transformers would read it as a LLaVA of its own whose weights are all missing."""
    write_json(tmp_path / "config.json", {"model_type": "llava", "mm_vision_tower": "openai/clip-vit"})
    with pytest.raises(AdapterError, match="llava-hf has") as caught:
        load_model(tmp_path, CPU)
    assert_four_lines(caught.value)
