"""The sizes of a model, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from eqat_mm.blocks.arch import Arch
from eqat_mm.blocks.source import empty_model

Size = tuple[int, int]

_DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class BlockShape:
    """One decoder block.

    Attributes:
        linears: (outputs, inputs) of every quantized linear.
        names: theirs, from the list of blocks on.
        other: numbers in everything else: norms, biases, routers.
        routed: those of the linears that belong to experts.
        experts: number of experts.
        sent: how many of them a token is sent to.
    """

    linears: tuple[Size, ...]
    names: tuple[str, ...]
    other: int
    routed: tuple[Size, ...] = ()
    experts: int = 0
    sent: int = 0

    @property
    def weights(self) -> int:
        """Numbers in the quantized linears."""
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def passed(self) -> int:
        """Numbers in the quantized linears that a token passes."""
        routed = sum(rows * columns for rows, columns in self.routed)
        return self.weights - (routed * (self.experts - self.sent) // self.experts if routed else 0)

    @property
    def inner(self) -> int:
        """Width of the MLP: the most outputs of a linear, or of the experts of a token together."""
        return max(max(rows for rows, _ in self.linears), self.sent * max((rows for rows, _ in self.routed), default=0))

    @property
    def largest_linear(self) -> int:
        """Numbers in the largest linear."""
        return max(rows * columns for rows, columns in self.linears)


@dataclass(frozen=True)
class ModelShape:
    """A model by its numbers.

    Attributes:
        blocks: the decoder blocks.
        hidden: channels of the residual stream.
        queries: channels of all query heads.
        vocabulary: rows of the head.
        embedding: numbers in the embedding.
        head: numbers in the output head; 0 where it is tied to the embedding.
        rest: numbers in everything else that is not quantized: final norm, vision tower, projector.
        projector: numbers in the projector; 0 in a language model.
        patches: positions the vision tower computes for one image, all tiles counted; 0 in a language model.
        image_tokens: tokens of the language model for one image, all tiles counted.
        stored: bytes of a number in the files of the full-precision model.
    """

    blocks: tuple[BlockShape, ...]
    hidden: int
    queries: int
    vocabulary: int
    embedding: int
    head: int
    rest: int
    projector: int
    patches: int
    image_tokens: int
    stored: int

    @property
    def weights(self) -> int:
        """Numbers in all quantized linears."""
        return sum(block.weights for block in self.blocks)

    @property
    def passed(self) -> int:
        """Numbers in the quantized linears that a token passes."""
        return sum(block.passed for block in self.blocks)

    @property
    def unquantized(self) -> int:
        """Numbers that are never quantized."""
        return self.embedding + self.head + self.rest + sum(block.other for block in self.blocks)

    @property
    def parameters(self) -> int:
        """All numbers."""
        return self.weights + self.unquantized

    @property
    def largest(self) -> BlockShape:
        """The block with most weights."""
        return max(self.blocks, key=lambda block: block.weights)


def shape_of_config(config: dict[str, Any], arch: Arch) -> ModelShape:
    """Return the shape of the model that a config.json describes.

    Raises:
        AdapterError: the adapter's paths do not match the model.
    """
    fields = {name: value for name, value in config.items() if name not in ("model_type", "quantization_config")}
    built = transformers.AutoConfig.for_model(config["model_type"], **fields)
    with torch.device("meta"):  # nothing is computed, whatever sizes the file says
        model = empty_model(built, arch)
    return shape_of(model, arch)


def shape_of(model: nn.Module, arch: Arch) -> ModelShape:
    """Return the shape of a model, whose parameters may be on the meta device.

    Raises:
        AdapterError: the adapter's paths do not match the model.
    """
    assert isinstance(model, transformers.PreTrainedModel)
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    rows = enumerate(arch.find_blocks(model))
    blocks = tuple(_block(block, arch, text, arch.block_name(index)) for index, block in rows)
    embedding, head = _weight(model.get_input_embeddings()), _weight(model.get_output_embeddings())
    tied = config.tie_word_embeddings or text.tie_word_embeddings
    ends = embedding.numel() + (0 if head is embedding else head.numel())
    inside = sum(block.weights + block.other for block in blocks)
    projector = arch.find_projector(model)
    patches, image_tokens = _image(config)
    return ModelShape(
        blocks=blocks,
        hidden=text.hidden_size,
        queries=_queries(text),
        vocabulary=head.shape[0],
        embedding=embedding.numel(),
        head=0 if tied else head.numel(),
        rest=_total(model) - inside - ends,
        projector=0 if projector is None else _total(projector),
        patches=patches,
        image_tokens=image_tokens,
        stored=_stored_bytes(config),
    )


def _block(block: nn.Module, arch: Arch, text: Any, name: str) -> BlockShape:
    linears = {path: (linear.out_features, linear.in_features) for path, linear in arch.named_linears(block)}
    weights = sum(rows * columns for rows, columns in linears.values())
    rounds = [each for each in arch.rounds_of(block) if each.experts is not None]
    routed = tuple(linears[path] for each in rounds for stage in each.stages for path in stage)
    experts = len(rounds[0].stages) if rounds else 0
    sent = min(experts, getattr(text, "num_experts_per_tok", None) or experts)
    names = tuple(f"{name}.{path}" for path in linears)
    return BlockShape(tuple(linears.values()), names, _total(block) - weights, routed, experts, sent)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _total(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _queries(text: Any) -> int:
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(head_dim * text.num_attention_heads)


def _image(config: Any) -> tuple[int, int]:
    """Return (patches, tokens) of one image: a photo where a model takes any size, at most four tiles and the whole."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return 0, 0
    height, width = _pair(getattr(vision, "image_size", _PHOTO))
    patches = (height // _pair(vision.patch_size)[0]) * (width // _pair(vision.patch_size)[1])
    views = 5 if any(hasattr(config, name) for name in ("image_grid_pinpoints", *_MERGES[2:])) else 1
    tokens = getattr(config, "mm_tokens_per_image", None) or round(patches / _merged(config, vision) ** 2)
    return views * (patches + 1), views * tokens


_PHOTO = (480, 640)
_MERGES = ("spatial_merge_size", "spatial_merge_size", "scale_factor", "downsample_ratio")


def _merged(config: Any, vision: Any) -> float:
    """Return how many patches, in each direction, become a token."""
    for owner, name in zip((config, vision, config, config), _MERGES, strict=True):
        if factor := getattr(owner, name, None):
            return float(factor if factor >= 1 else 1 / factor)
    return 1.0


def _pair(sides: Any) -> tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else tuple(sides)


def _stored_bytes(config: Any) -> int:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    return _DTYPES.get(str(dtype).removeprefix("torch."), torch.float32.itemsize)
