"""Images and captions; every program reads them in the same way."""

from ..errors import need


need("train", __name__, "datasets", "pyarrow")
