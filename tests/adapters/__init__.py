"""Tests of llava_adapters."""
