"""Tests of eqat_mm.commands."""
