"""Checkpoints of other libraries as models of transformers, with the same outputs."""
