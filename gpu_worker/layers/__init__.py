"""Layers that model families share. Each names the tensors it is made of, so loading needs no rules."""
