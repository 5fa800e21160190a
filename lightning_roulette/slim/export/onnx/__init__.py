"""Files in the format of ONNX, written by PyTorch's exporter and checked with onnxruntime."""
