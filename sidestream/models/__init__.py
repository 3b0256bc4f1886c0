"""Models by name, with their weights, labels and input spec."""

from sidestream.models.create import create_model, list_models, model_info
from sidestream.models.info import ModelInfo, info_of, input_spec_of, labels_of
from sidestream.models.labels import read_labels
from sidestream.models.weights import load_weights, save_weights

__all__ = [
    "ModelInfo",
    "create_model",
    "info_of",
    "input_spec_of",
    "labels_of",
    "list_models",
    "load_weights",
    "model_info",
    "read_labels",
    "save_weights",
]
