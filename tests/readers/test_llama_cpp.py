"""llama.cpp computes what we do: every architecture, rotation and vocabulary that is exported; images of a LLaVA."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from eqat_mm.checkpoint import load
from eqat_mm.commands.verbs.export import ExportJob, export
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.quant.spec import QuantSpec
from tests.export.made import byte_tokenizer, rounded, save_llama, sentencepiece_tokenizer
from tests.readers.environments import command

pytestmark = [pytest.mark.readers, pytest.mark.network, pytest.mark.filterwarnings("default")]

HERE = Path(__file__).parent
THETA = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"head_dim": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "llama3": ("llama", {"rope_parameters": {**LLAMA_3, **THETA, "original_max_position_embeddings": 32}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", **THETA}}),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", **THETA, "original_max_position_embeddings": 32}}),
}
TOKENIZERS = {"bytes": byte_tokenizer, "sentencepiece": sentencepiece_tokenizer}
TEXTS = ["and in sand", "band  an d", "the and</s> and"]


def asked(checkpoint: Path, folder: Path, **request: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits and the rest of the answer of llama.cpp over an exported checkpoint."""
    exported = export(ExportJob(str(checkpoint), to="gguf", output=folder / "out", embedding="f16"))
    (folder / "request.json").write_text(json.dumps({"tokens": 1, **request}), encoding="utf-8")
    files = [str(next(exported.glob("*.gguf"))), str(folder / "request.json"), str(folder / "answer.npz")]
    words, variables = command("llama.cpp", HERE / "llama_cpp.py", *files)
    subprocess.run(words, env=variables, check=True, capture_output=True)
    answer = np.load(folder / "answer.npz")
    return torch.from_numpy(answer["logits"]), json.loads(str(answer["said"]))


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, tmp_path: Path) -> None:
    kind, changes = MODELS[name]
    save_llama(tmp_path / "full", kind, **changes)
    checkpoint = rounded(tmp_path, QuantSpec(8, 32, symmetric=True), kind)
    ids = torch.randint(3, 80, (2, 100), generator=torch.Generator().manual_seed(1))
    theirs, _ = asked(checkpoint, tmp_path, windows=ids.tolist())
    with torch.no_grad():
        ours = load(checkpoint)(input_ids=ids).logits
    kl = (ours.softmax(-1) * (ours.log_softmax(-1) - theirs.log_softmax(-1))).sum(-1).mean()
    assert kl < 4e-3  # activations of 8 bits; a wrong rotation gives 0.1 and more


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens(name: str, tmp_path: Path) -> None:
    save_llama(tmp_path / "full")
    for file in (tmp_path / "full").glob("tokenizer*"):
        file.unlink()
    tokenizer = TOKENIZERS[name]()
    tokenizer.save_pretrained(tmp_path / "full")
    checkpoint = rounded(tmp_path, QuantSpec(8, 32, symmetric=True), "llama")
    _, said = asked(checkpoint, tmp_path, texts=TEXTS)
    assert said["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_images(tmp_path: Path) -> None:
    checkpoint = rtn(RTNJob("demo-llava", tmp_path / "run", QuantSpec(4, 64, symmetric=True)))
    exported = export(ExportJob(str(checkpoint), to="gguf", output=tmp_path / "out"))
    questions = []
    for colour in ("red", "blue"):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=colour)
        image.save(tmp_path / f"{colour}.png")
        asked = {"image": str(tmp_path / f"{colour}.png"), "question": "what color is the circle?", "tokens": 4}
        questions.append(asked)
    (tmp_path / "request.json").write_text(json.dumps(questions), encoding="utf-8")
    files = [next(exported.glob("demo*.gguf")), next(exported.glob("mmproj*.gguf"))]
    files += [tmp_path / "request.json", tmp_path / "answer.json"]
    words, variables = command("xllamacpp", HERE / "llama_cpp_images.py", *map(str, files))
    subprocess.run(words, env=variables, check=True, capture_output=True)
    assert [word.strip() for word in json.loads((tmp_path / "answer.json").read_text())] == ["red", "blue"]
