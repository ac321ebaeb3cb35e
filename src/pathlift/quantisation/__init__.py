"""Quantisation of weights, without data or with them, and what it costs (mathematics §9)."""

from pathlift.quantisation import arguments as arguments
from pathlift.quantisation.activations import activation_ranges
from pathlift.quantisation.api import quantize
from pathlift.quantisation.api import rounded_to_nearest as rounded_to_nearest
from pathlift.quantisation.files import load_quantized
from pathlift.quantisation.gauge import GaugeChoice
from pathlift.quantisation.needed import BitsNeeded, bits_needed
from pathlift.quantisation.onnx import save_onnx
from pathlift.quantisation.report import QuantizeReport
from pathlift.quantisation.same_grid import SameGrid
from pathlift.quantisation.sensitivity import layer_sensitivities
from pathlift.quantisation.spending import Bytes
from pathlift.quantisation.tensors import QuantizedTensor

__all__ = [
    "BitsNeeded",
    "Bytes",
    "GaugeChoice",
    "QuantizeReport",
    "QuantizedTensor",
    "SameGrid",
    "activation_ranges",
    "bits_needed",
    "layer_sensitivities",
    "load_quantized",
    "quantize",
    "save_onnx",
]
