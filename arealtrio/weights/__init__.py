"""New weights on every server, while generation goes on around it.

``update`` says what is to be loaded, ``flow`` brings it to every server, ``distributed`` and
``adapters`` are the parts of it that are of one kind only.
"""

from ..wire.weights import AdapterSpec, TensorSpec
from .distributed import init_weights_group
from .flow import update_weights
from .update import Chunk, Send, WeightsGroup, WeightUpdate, WeightUpdateResult

__all__ = [
    "AdapterSpec",
    "Chunk",
    "Send",
    "TensorSpec",
    "WeightUpdate",
    "WeightUpdateResult",
    "WeightsGroup",
    "init_weights_group",
    "update_weights",
]
