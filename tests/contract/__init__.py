"""Tests of eqat_mm.contract."""
