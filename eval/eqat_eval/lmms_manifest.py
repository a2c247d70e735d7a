"""What lmms-eval reads from the entry-point group `lmms_eval.models`; light, because it is read at every start."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

EQAT = ModelManifest(model_id="eqat", simple_class_path="eqat_eval.lmms_model.EqatVLM")
