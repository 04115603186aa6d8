"""Engines that `bench/gpu.py` measures, each in a process of its own: `make(options) -> Engine`."""
