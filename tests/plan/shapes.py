"""Shapes of shipped models."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from eqat_mm.plan.models import shipped_config
from eqat_mm.plan.shape import ModelShape, shape_of_config
from llava_adapters.registry import arch_of_config


@cache
def shape(name: str) -> ModelShape:
    config = shipped_config(name)
    assert config is not None
    return shape_of_config(config, arch_of_config(config, Path(name)))
