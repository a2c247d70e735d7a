"""Tests of eqat_mm.quant."""
