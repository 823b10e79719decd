"""New weights on every server, while generation goes on around it.

``update`` says what is to be loaded, ``flow`` brings it to every server, ``distributed`` and
``adapters`` are the parts of it that are of one kind only.
"""

from .distributed import init_weights_group
from .flow import update_weights
from .update import Send, WeightsGroup, WeightUpdate, WeightUpdateResult

__all__ = [
    "Send",
    "WeightUpdate",
    "WeightUpdateResult",
    "WeightsGroup",
    "init_weights_group",
    "update_weights",
]
