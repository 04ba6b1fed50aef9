"""The generator as ONNX graphs: built from the parameters, written, and run by onnxruntime."""
