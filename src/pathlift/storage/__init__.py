"""What lies in files: checkpoints, models by name, data, ONNX."""
