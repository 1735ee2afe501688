"""Layers whose matmuls run on low-bit operands: recipes, the layer, and the conversion of a model."""

from .convert import quantize_, to_dense_
from .dense import high_precision_
from .linear import QuantLinear
from .operand import Operand
from .presets import recipes
from .recipe import Recipe
from .report import Report
from .stored import StoredWeight
from .stored_flat import StoredFlat as _StoredFlat  # its rules

__all__ = ["Operand", "QuantLinear", "Recipe", "Report", "high_precision_", "quantize_", "recipes", "to_dense_"]
