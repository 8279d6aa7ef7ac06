"""Convert checkpoints of other libraries to models of transformers with the same outputs."""
