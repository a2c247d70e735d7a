"""The jobs behind eqat, one for each command: model, data, trainer and evaluator put together."""
