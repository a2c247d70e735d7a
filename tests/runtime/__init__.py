"""Tests of eqat_mm.runtime."""
