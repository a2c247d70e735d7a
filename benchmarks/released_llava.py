"""A stand-in for LLaVA-1.5-7B as the hub has it: its files, its names of tensors, its processor; the model is tiny.

    python benchmarks/released_llava.py FOLDER [--text demo-wikipedia]

FOLDER becomes a cache of the hub (`HF_HUB_CACHE`) that holds `llava-hf/llava-1.5-7b-hf`, and nothing else. Images
become 576 tokens and text is tokenised as Llama does, so that samples are as long as real ones; the language tower has
two blocks of 64 channels, and says nothing sensible.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn

from eqat_mm.data.image_text.style import template_text
from eqat_mm.data.text.documents import load_documents

REPOSITORY = "llava-hf/llava-1.5-7b-hf"
LEARNED = 8000
"""Most tokens that the tokenizer learns, 32,000 in the original; `<image>` is the one behind them, padding the next."""

FIRST = ["<unk>", "<s>", "</s>"]
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SEES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
DOCUMENTS = 4000
_SIZE = 336
_PIXELS = {
    "crop_size": {"height": _SIZE, "width": _SIZE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": _SIZE},
}
_PROCESSOR = {
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": 14,
    "processor_class": "LlavaProcessor",
    "vision_feature_select_strategy": "default",
}


def write_released(cache: Path, text: str = "demo-wikipedia") -> Path:
    """Write the repository into a cache of the hub; return its folder.

    Args:
        cache: of the hub, to be made.
        text: that the tokenizer learns from.
    """
    repository = cache / f"models--{REPOSITORY.replace('/', '--')}"
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(folder.name, encoding="utf-8")
    _write_model(folder, image=_write_speaker(folder, text))
    return folder


def _config(image: int) -> dict[str, Any]:
    vocabulary = image + 64
    text = TOWER | {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "model_type": "llama"}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": image,
        "model_type": "llava",
        "pad_token_id": image + 1,
        "projector_hidden_act": "gelu",
        "text_config": text
        | {"architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary, "torch_dtype": "float16"},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": SEES | {"image_size": _SIZE, "model_type": "clip_vision_model", "patch_size": 14},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": vocabulary,
    }


def _write_model(folder: Path, image: int) -> None:
    """Write config.json and random weights in three files with an index."""
    _write_json(folder / "config.json", _config(image))
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": image + 1})
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForImageTextToText.from_config(config)
        for matrix in (parameter for parameter in model.parameters() if parameter.dim() > 1):
            nn.init.normal_(matrix, std=0.1)  # large enough that every part matters
    model.half().save_pretrained(folder / "whole")
    tensors = _published(load_file(folder / "whole" / "model.safetensors"))
    for path in (folder / "whole").iterdir():
        path.unlink()
    (folder / "whole").rmdir()
    _write_shards(folder, tensors)


def _published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by the names of the published files; transformers 5 leaves out a part of some."""
    return {name.replace("vision_tower.", "vision_tower.vision_model.", 1): value for name, value in tensors.items()}


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int = 3) -> None:
    files, names = {}, iter(sorted(tensors))
    for number in range(1, count + 1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in islice(names, -(-len(tensors) // count))}
        save_file(part, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


def _write_speaker(folder: Path, text: str) -> int:
    """Write tokenizer, processor and template in the files that the repository has; return the id of `<image>`."""
    tokenizer = _tokenizer(text)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    about = {"add_bos_token": True, "legacy": False, "model_max_length": 4096, "padding_side": "left"}
    _write_json(folder / "tokenizer_config.json", special | about | {"tokenizer_class": "LlamaTokenizer"})
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "preprocessor_config.json", _PIXELS)
    _write_json(folder / "processor_config.json", _PROCESSOR)
    _write_json(folder / "chat_template.json", {"chat_template": template_text("llava_hf")})
    return int(tokenizer.token_to_id("<image>"))


def _tokenizer(text: str) -> Tokenizer:
    """Return a tokenizer of Llama's kind that has learned from a text: bytes for what it does not know."""
    vocabulary, merges = _learned(text)
    found = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    found.add_special_tokens([*FIRST, *(AddedToken(token, normalized=False) for token in ("<image>", "<pad>"))])
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return found


def _learned(text: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a vocabulary, special tokens and bytes first, and what is merged."""
    said = " ".join(islice(load_documents(text), DOCUMENTS)).split()
    words = (f"▁{word}" for word in said if "<" not in word)  # `<image>` is no word
    special = [*FIRST, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(BPE(unk_token="<unk>"))
    trained.train_from_iterator(words, BpeTrainer(vocab_size=LEARNED, special_tokens=special, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", default="demo-wikipedia")
    given = parser.parse_args()
    print(write_released(given.folder, given.text))
