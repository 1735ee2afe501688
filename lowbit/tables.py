"""How wide a table is: as the terminal it is printed in, and the same everywhere else."""

from __future__ import annotations

import shutil
import sys

ELSEWHERE = 160


def width() -> int:
    """Columns of the terminal, 160 where output goes elsewhere, so that files and logs do not depend on a window."""
    try:
        terminal = sys.stdout.isatty()
    except (AttributeError, ValueError):  # no stdout, or a closed one
        terminal = False
    return shutil.get_terminal_size((ELSEWHERE, 24)).columns if terminal else ELSEWHERE
