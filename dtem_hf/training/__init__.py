"""Training of merge embeddings; `training.program` is behind `recipes/train.py`."""

from ..errors import need


need("train", __name__)
