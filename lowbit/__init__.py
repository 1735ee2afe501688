"""lowbit: low-bit quantized training.

Three uses: wrap a model (`quantize_`), choose an optimizer and how its state is stored (`optim`), and compare with BF16
Adam (`lowbit bench` on the command line).
"""

from . import nn, optim
from .formats import Format, format, formats
from .nn import Operand, Recipe, Report, high_precision_, materialize_, quantize_, recipes, rescale_, to_dense_
from .optim import load_optimizer, save_optimizer
from .packed import Packed, quantize
from .policy import Policy
from .roles import Roles, roles

__all__ = [
    "Format",
    "Operand",
    "Packed",
    "Policy",
    "Recipe",
    "Report",
    "Roles",
    "format",
    "formats",
    "high_precision_",
    "load_optimizer",
    "materialize_",
    "nn",
    "optim",
    "quantize",
    "quantize_",
    "recipes",
    "rescale_",
    "roles",
    "save_optimizer",
    "to_dense_",
]


def __getattr__(name: str) -> str:
    if name == "__version__":  # read when asked for: importing reads no files
        from importlib.metadata import version

        return version("lowbit")
    raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
