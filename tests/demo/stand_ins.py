"""A tiny language model and tiny trained parts, of which the demo LLaVA can be put together in a second."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from eqat_demo.llava import build
from llava_adapters.tiny import tiny_config, tiny_vision_config

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<jupyter_code>"]
LINEARS = ("self_attn.q_proj", "mlp.down_proj")
SIZE, PATCH, PATCHES = 32, 16, 4


def save_language_model(folder: Path) -> None:
    """Save a Llama of two blocks and a tokenizer of single bytes and an unused special token."""
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens(SPECIAL)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = tiny_config("llama", vocab_size=len(tokens), tie_word_embeddings=True, initializer_range=0.2, **ends)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "LICENSE").write_text("Apache")


def save_parts(folder: Path) -> None:
    """Save a random vision tower, projector and LoRA of rank 2 on two linears of block 1."""
    vision = tiny_vision_config(SIZE, PATCH)
    transformers.CLIPVisionModel(vision).half().save_pretrained(folder / build.VISION_TOWER)
    config = transformers.LlavaConfig(vision_config=vision, text_config=tiny_config("llama"))
    projector = {name: tensor.half() for name, tensor in LlavaMultiModalProjector(config).state_dict().items()}
    save_file(projector, folder / build.PROJECTOR)
    shapes = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 128)}
    factors = {}
    for linear in LINEARS:
        outputs, inputs = shapes[linear]
        factors[f"model.layers.1.{linear}.lora_A"] = torch.randn(2, inputs).half()
        factors[f"model.layers.1.{linear}.lora_B"] = torch.randn(outputs, 2).half()
    save_file(factors, folder / build.LORA)
    (folder / build.CARD).write_text("card")
