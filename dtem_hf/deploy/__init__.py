"""Models as they are deployed: graphs for ONNX Runtime and AOTInductor, and what runs them."""

from ..errors import need


need("onnx", __name__, "accelerate", "datasets", "pyarrow")
