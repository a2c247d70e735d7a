"""Tests of eqat_kernels."""
