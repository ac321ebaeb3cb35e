"""What lies in files: checkpoints, models by name, data, ONNX."""

from pathlift.storage import arguments as arguments
