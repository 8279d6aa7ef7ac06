"""Deployment: export models for ONNX Runtime, OpenVINO and AOTInductor, and run them there."""

from ..errors import need


need("onnx", __name__, "accelerate", "datasets", "pyarrow")
