"""Layers whose matmuls run on low-bit operands: recipes, the layer, and the conversion of a model."""

from .convert import quantize_, to_dense_
from .dense import high_precision_
from .linear import QuantLinear
from .operand import Operand
from .presets import recipes
from .recipe import Recipe
from .report import Report

__all__ = ["Operand", "QuantLinear", "Recipe", "Report", "high_precision_", "quantize_", "recipes", "to_dense_"]
