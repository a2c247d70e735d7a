"""A row of blocks that calls each of them in every way Python allows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 8


class ToyBlock(nn.Module):
    """Mixes tokens under a mask; returns a tuple, as many decoder blocks do."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, hidden: Tensor, gain: Tensor, *, mask: Tensor | None, extras: dict[str, Any], flag: bool
    ) -> tuple[Tensor, None]:
        """Return hidden states [B, T, H] and nothing else."""
        assert flag is (self.index == 0)
        cos, sin = extras["tables"]
        mixed = self.proj(hidden * cos + hidden.roll(1, -1) * sin) * gain + extras["nested"]["bias"]
        scores = mixed @ mixed.mT
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e4)
        return hidden + scores.softmax(-1) @ mixed, None


class ToyModel(nn.Module):
    """Each block gets a mask of its own; tables and gain are shared."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(ToyBlock(index) for index in range(depth))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, use_cache: bool) -> Tensor:
        """Return hidden states [B, T, H]; `calls` keeps what each block was called with."""
        assert use_cache is False
        hidden = self.embed(input_ids)
        length = input_ids.shape[1]
        self.calls = []
        for index, block in enumerate(self.blocks):
            args = (torch.linspace(0.5, 1.5, WIDTH),)
            angle = torch.arange(length)[:, None].expand(length, WIDTH)[None] / 10
            extras = {"tables": (angle.cos(), angle.sin()), "nested": {"bias": torch.ones(WIDTH), "note": "kept"}}
            kwargs = {"mask": self.mask(length, index, attention_mask), "extras": extras, "flag": index == 0}
            self.calls.append((args, kwargs))
            result = block(hidden, *args, **kwargs)
            hidden = result[0] if isinstance(result, tuple) else result
        return self.norm(hidden)  # type: ignore[no-any-return]

    @staticmethod
    def mask(length: int, index: int, attention_mask: Tensor | None) -> Tensor | None:
        """Causal in a window that widens with the block; without padding, block 0 gets none."""
        if attention_mask is None and index == 0:
            return None
        positions = torch.arange(length)
        distance = positions[:, None] - positions[None]
        window = ((distance >= 0) & (distance <= index + 1))[None]
        return window if attention_mask is None else window & attention_mask.bool()[:, None, :]


def tokens(batch: int, length: int, seed: int) -> Tensor:
    """Return random token ids [B, T]."""
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(seed))
