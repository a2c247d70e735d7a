"""Tests of eqat_eval."""
