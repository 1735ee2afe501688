"""lowbit: low-bit quantized training.

Three uses: wrap a model (`quantize_`), choose an optimizer and how its state is stored (`optim`), and compare with BF16
Adam (`lowbit bench` on the command line).
"""

from importlib.metadata import version as _version

from . import optim
from .formats import Format, format, formats
from .optim import load_optimizer, save_optimizer
from .packed import Packed, quantize
from .policy import Policy

__version__ = _version("lowbit")

__all__ = [
    "Format",
    "Packed",
    "Policy",
    "format",
    "formats",
    "load_optimizer",
    "optim",
    "quantize",
    "save_optimizer",
]
