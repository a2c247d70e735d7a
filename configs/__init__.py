"""Recipes and DeepSpeed configurations: data only, installed as the package `eqat_configs`."""
