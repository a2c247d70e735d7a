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

from llava_adapters.demo_llava import build

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
    config = transformers.LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "LICENSE").write_text("Apache")


def save_parts(folder: Path) -> None:
    """Save a random vision tower, projector and LoRA of rank 2 on two linears of block 1."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
    )
    transformers.CLIPVisionModel(vision).half().save_pretrained(folder / build.VISION_TOWER)
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(hidden_size=64))
    projector = {name: tensor.half() for name, tensor in LlavaMultiModalProjector(config).state_dict().items()}
    save_file(projector, folder / build.PROJECTOR)
    shapes = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 96)}
    factors = {}
    for linear in LINEARS:
        outputs, inputs = shapes[linear]
        factors[f"model.layers.1.{linear}.lora_A"] = torch.randn(2, inputs).half()
        factors[f"model.layers.1.{linear}.lora_B"] = torch.randn(outputs, 2).half()
    save_file(factors, folder / build.LORA)
    (folder / build.CARD).write_text("card")
