"""Models as they are deployed: graphs for ONNX Runtime and AOTInductor, and what runs them."""
