"""What is broken where a block gives numbers that are not finite before it was trained: its weights, or a stream."""

from __future__ import annotations

import math

from eqat_mm.blocks.spool import Stream
from eqat_mm.blocks.walker import BlockStep, BlockWalker
from eqat_mm.errors import TrainingError
from eqat_mm.train.non_finite import first_non_finite

_SHOWN = 8


def require_finite_targets(walker: BlockWalker, step: BlockStep, mean_square: float) -> None:
    """Check what the full-precision block gave on all samples, by the mean of its squares.

    Raises:
        TrainingError: names the weight or the samples that are not finite.
    """
    if not math.isfinite(mean_square):
        raise broken_block(walker, step, f"the full-precision block's output has a mean square of {mean_square}")


def broken_block(walker: BlockWalker, step: BlockStep, seen: str) -> TrainingError:
    """Return the error of a block that no learning rate mends; all ranks ask at once.

    Args:
        walker: of the block.
        step: the block, before its first optimizer step.
        seen: what was not finite.
    """
    tensors = [*step.block.named_parameters(), *step.block.named_buffers()]
    name = first_non_finite((name, value) for name, value in tensors if not value.is_meta)
    if name is not None:
        return _error(
            f"{step.name}.{name}",
            f"{seen}; this tensor is not finite",
            "make the model again, from a source without NaN or infinity in this tensor",
        )
    for stream, what in ((step.quantized, "input, in the quantized stream,"), (step.fp, "full-precision stream")):
        samples = _not_finite(walker, step, stream)
        if samples:
            return _error(
                f"{step.name}, calibration samples {', '.join(map(str, samples[:_SHOWN]))} ({len(samples)} in all)",
                f"{seen}; the block's {what} is not finite on these",
                "look at these samples and at the weights before this block, or use --precision float32",
            )
    return _error(
        step.name,
        f"{seen}, from weights and streams that are finite",
        "its numbers are too large: use --precision float32, or look at the model's weights",
    )


def samples_that_are_not_finite(walker: BlockWalker, step: BlockStep) -> bool:
    """Whether some sample of a stream is not finite; all ranks ask at once."""
    return any(_not_finite(walker, step, stream) for stream in (step.quantized, step.fp))


def _error(where: str, given: str, do: str) -> TrainingError:
    allowed = "finite numbers before the first step: no learning rate makes up for others"
    return TrainingError(where=where, given=given, allowed=allowed, do=do)


def _not_finite(walker: BlockWalker, step: BlockStep, stream: Stream) -> list[int]:
    """Return the samples of all ranks that are not finite in a stream."""
    mine = []
    for part, (values,) in walker.parts(step, [stream], step.batches(range(len(step.sorts)), walker.batch_tokens)):
        if part.mine:
            samples = values.split([step.calls[index].batch for index in part.mine])
            mine += [index for index, sample in zip(part.mine, samples, strict=True) if not sample.isfinite().all()]
    held = walker.ranks.share(len(step.sorts))
    return sorted(sample for found in walker.ranks.gathered([held[index] for index in mine]) for sample in found)
