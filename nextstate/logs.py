"""Where a process writes what it has to say: to its standard error, one line an event."""

from __future__ import annotations

import logging
import sys


def to_stderr() -> None:
    """Configures logging; for `__main__` only."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
