"""Tests of eqat_mm.train."""
