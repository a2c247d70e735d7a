"""Small random models and batches with which adapters are tested."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from eqat_mm.blocks.arch import Inputs

VOCABULARY = 97


def tiny_causal_lm(model_type: str, **overrides: Any) -> tuple[nn.Module, list[Inputs]]:
    """Return a random two-block causal language model and its batches.

    Args:
        model_type: as in config.json.
        overrides: fields of its configuration.

    Returns:
        The model (hidden 64, MLP 128, 4 heads, 2 KV heads, vocabulary 97) in eval mode, and three batches of
        3 x 10 tokens: unpadded, padded on the left, padded on the right.
    """
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        **overrides,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval(), text_batches()


def text_batches() -> list[Inputs]:
    """Return three batches of 3 x 10 token ids: unpadded, left-padded and right-padded."""
    tokens = torch.randint(0, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(1))
    left = torch.ones_like(tokens)
    left[0, :4] = 0
    left[2, :1] = 0
    return [{"input_ids": tokens}, _padded(tokens, left), _padded(tokens, left.flip(1))]


def _padded(tokens: Tensor, mask: Tensor) -> Inputs:
    return {"input_ids": tokens, "attention_mask": mask}
