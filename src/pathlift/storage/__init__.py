"""What lies in files: checkpoints, models by name, data, ONNX."""

from pathlift.storage import arguments as arguments
from pathlift.storage.checkpoints import Checkpoint
from pathlift.storage.models import default_shape, load_model, load_state, save_tensors

__all__ = [
    "Checkpoint",
    "default_shape",
    "load_model",
    "load_state",
    "save_tensors",
]
