"""Text in the terminal: notices around a progress bar, and aligned tables."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from tqdm import tqdm


def notify(text: str) -> None:
    """Tell the user, on stderr, around a progress bar."""
    tqdm.write(text, file=sys.stderr)


class LogNotices(logging.Handler):
    """Tells the user what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        notify(("WARNING: " if record.levelno >= logging.WARNING else "") + record.getMessage())


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Align rows of cells; the first column to the left."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table)
