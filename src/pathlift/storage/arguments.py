"""What files, and what is read from them or written to them, may be."""

from __future__ import annotations

from pathlift.arguments import declare
from pathlift.arguments.kinds import anything, either, file, flag, mapping, plain_tensor, text
from pathlift.storage.checkpoints import Checkpoint

model_name = text("torchvision:NAME, timm:NAME, hf:FOLDER, package.module:factory, or a .onnx or .pt2 file")

declare(__name__, {
    "path": file,
    "key": text("the key that leads to the weights in a file: model_ema", least=1),
    "weights": either(
        "a file of weights, an index, a folder with either, or a Checkpoint", (Checkpoint, anything), (object, file)
    ),
    "load_model.name": model_name,
    "default_shape.name": model_name,
    "arguments": mapping("a mapping from names to values", anything),
    "trust": flag,
    "tensors": mapping("a mapping from names to tensors", plain_tensor),
})  # fmt: skip
