"""Training of merge embeddings; `recipes/train.py` runs `training.program`."""

from ..errors import need


need("train", __name__)
