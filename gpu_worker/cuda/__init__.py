"""The CUDA half of the worker: a runner that never waits for the device, captured decode steps, sizing."""
