"""Typed clients of the public API, the `baton` command and the offline `LLM` face."""
