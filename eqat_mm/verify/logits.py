"""Does a model with the weights that were unpacked here predict what the packed one predicts?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from eqat_eval.prompts import encode_prompt
from eqat_mm.checkpoint.build import skeleton
from eqat_mm.checkpoint.folders import load_tokenizer, takes_images
from eqat_mm.checkpoint.manifest import Manifest
from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.source import packed_names
from eqat_mm.errors import EqatError
from eqat_mm.verify.checks import Check
from eqat_mm.verify.packed import Opened
from eqat_mm.verify.slabs import Array

TEXT = (
    "The river rises in the hills above the town and reaches the sea after ninety miles. In spring, when snow melts,"
    " it floods the lower meadows, and for a week or two the road to the mill is under water. The people of the valley"
    " have learned to live with it: their houses stand on the higher bank, and the boats are kept in the barns."
)
"""What is predicted where no text is given."""

QUESTION = "What is in this picture?"
_CLOSE = 2e-3
"""Of the largest logit: what two ways of computing one float32 model differ by."""


def logits_check(
    source: Opened, manifest: Manifest, weights: Iterable[tuple[str, Array]], text: str, *, exact: bool
) -> Check:
    """Compare the logits of a packed checkpoint with those of a dense model.

    Args:
        source: the packed checkpoint.
        manifest: of it.
        weights: dense weights of its linears by their names in the model, float32 [O, I], from another reader.
        text: to predict.
        exact: whether they are meant to be the same.
    """
    asked = list(_inputs(source.folder, text))
    packed = load(source.folder, dtype=torch.float32, verify=False)
    ours = [_logits(packed, inputs) for _, inputs in asked]
    del packed
    dense = _dense(source, manifest, weights)
    found = [_compared(what, mine, _logits(dense, inputs)) for (what, inputs), mine in zip(asked, ours, strict=True)]
    worst = max(error for error, _, _ in found)
    said = "; ".join(line for _, _, line in found)
    return Check("logits", all(kept for _, kept, _ in found) if not exact else worst < _CLOSE, said)


def _compared(what: str, ours: Tensor, theirs: Tensor) -> tuple[float, bool, str]:
    error = float((theirs - ours).abs().max() / ours.abs().max())
    agree = float((theirs.argmax(-1) == ours.argmax(-1)).float().mean())
    found, expected = (logits.flatten(0, -2).log_softmax(-1) for logits in (theirs, ours))
    kl = float(torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean"))
    line = f"on {what} they differ by {error:.1e} of the largest, KL {kl:.1e}, top-1 agreement {agree:.1%}"
    return error if np.isfinite(error) else np.inf, bool(np.isfinite(kl)), line


@torch.no_grad()
def _logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs, use_cache=False).logits
    return found.float()


def _inputs(folder: Path, text: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield what is asked: text, and a question about an image where the model sees."""
    try:
        inputs = dict(load_tokenizer(folder)(text, return_tensors="pt", truncation=True, max_length=512))
        yield "text", {"input_ids": inputs["input_ids"]}
    except EqatError:
        rows = transformers.AutoConfig.from_pretrained(folder).get_text_config(decoder=True).vocab_size
        drawn = torch.randint(0, rows, (1, 64), generator=torch.Generator().manual_seed(0))
        yield "random tokens, for want of a tokenizer", {"input_ids": drawn}
    if takes_images(folder):
        yield "an image", _about_an_image(folder)


def _about_an_image(folder: Path) -> dict[str, Tensor]:
    from PIL import Image

    from eqat_mm.checkpoint.speaker import load_speaker

    across = np.linspace(0, 255, 96, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(across[None, :], across[:, None], across[None, ::-1]), -1)
    return encode_prompt(load_speaker(folder), QUESTION, [Image.fromarray(pixels)], chat=True)


def _dense(source: Opened, manifest: Manifest, weights: Iterable[tuple[str, Array]]) -> transformers.PreTrainedModel:
    """Return transformers' model with dense weights, everything else from the files of the source."""
    model = skeleton(source.folder, manifest)
    rename = packed_names(model)
    state = {f"{name}.weight": torch.from_numpy(np.array(weight)) for name, weight in weights}
    names = {rename(stored): stored for stored in source.slabs}
    wanted = {name for name, tensor in model.named_parameters() if tensor.is_meta} | set(model.state_dict())
    for name in wanted - state.keys():
        if name in names:
            state[name] = torch.from_numpy(source.slabs[names[name]].numbers())
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights(missing_keys=wanted - state.keys(), recompute_mapping=False)
    model.eval()
    return model


def in_model(source: Opened, manifest: Manifest) -> Callable[[str], str]:
    """Return the function from what files call a linear to its name in the model."""
    rename = packed_names(skeleton(source.folder, manifest))
    return lambda linear: rename(f"{linear}.weight_scale").removesuffix(".weight_scale")
