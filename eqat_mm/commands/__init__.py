"""The jobs behind `eqat`: each puts adapter, data, trainer and evaluator together."""
