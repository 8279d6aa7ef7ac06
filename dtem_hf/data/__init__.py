"""Reading of images and captions, in the same way in every program."""

from ..errors import need


need("train", __name__, "datasets", "pyarrow")
