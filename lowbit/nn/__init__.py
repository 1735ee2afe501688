"""Layers whose matmuls run on low-bit operands: recipes, the layer, and the conversion of a model."""

from .convert import quantize_, to_dense_
from .counts import call_counts, load_call_counts_
from .dense import high_precision_
from .embedding import QuantEmbedding
from .linear import QuantLinear
from .materialize import materialize_
from .operand import Operand
from .osci_reset import OsciReset
from .out_control import OutControl
from .presets import recipes
from .recipe import Recipe
from .report import Report
from .stored import StoredWeight
from .stored_flat import StoredFlat  # which also tells `stored_ops` what to do with lists
from .stored_state import rescale_

__all__ = [
    "Operand",
    "OsciReset",
    "OutControl",
    "QuantEmbedding",
    "QuantLinear",
    "Recipe",
    "Report",
    "StoredFlat",
    "StoredWeight",
    "call_counts",
    "high_precision_",
    "load_call_counts_",
    "materialize_",
    "quantize_",
    "recipes",
    "rescale_",
    "to_dense_",
]
