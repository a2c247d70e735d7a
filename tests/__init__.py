"""Tests; the folders mirror the packages, `tests.tolerances` is the one table of tolerances."""
