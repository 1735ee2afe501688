"""lowbit."""

from .formats import Format, format, formats
from .packed import Packed, quantize

__version__ = "0.1.0"
