"""The jobs behind `eqat` and scripts/: each puts adapter, data, trainer and evaluator together."""
