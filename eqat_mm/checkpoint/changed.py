"""Whether a loaded model still is what its checkpoint says."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from eqat_mm.checkpoint.adapters import has_adapters
from eqat_mm.checkpoint.layout import BYTES, format_of, to_bytes
from eqat_mm.checkpoint.origin import Origin
from eqat_mm.checkpoint.write import stored_state


def is_as_loaded(model: PreTrainedModel) -> bool:
    """Whether saving a model would write the files again that it was loaded from, weight by weight.

    Args:
        model: packed, as `load` gives it. With adapters it counts as changed.
    """
    origin: Origin = model.checkpoint_origin  # type: ignore[assignment]
    base = origin.unchanged()
    if base is None or has_adapters(model) or origin.config_of(model) != origin.config:
        return False
    state = stored_state(model)
    if format_of(origin.manifest.widths) == BYTES:
        state = to_bytes(state)
    for names in origin.shards.values():
        for stored, name in names.items():
            if name in origin.dtypes:
                there, now = base.read(stored), state[name].detach().cpu()
                if there.shape != now.shape or not torch.equal(there.to(now.dtype), now):
                    return False
    return True
