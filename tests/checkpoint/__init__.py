"""Tests of eqat_mm.checkpoint."""
