"""Tests of eqat_mm.blocks."""
