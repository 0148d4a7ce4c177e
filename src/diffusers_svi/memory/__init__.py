"""What memory films and training need, on the GPU and beside it, computed from the shapes of a model alone."""

from .inference import Clip, inference_memory
from .model import ModelShapes, model_shapes
from .phases import CARDS, Phase, Plan
from .training import Training, training_memory


__all__ = [
    "CARDS",
    "Clip",
    "ModelShapes",
    "Phase",
    "Plan",
    "Training",
    "inference_memory",
    "model_shapes",
    "training_memory",
]
