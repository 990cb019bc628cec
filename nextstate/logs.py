"""How every process writes its log: to its standard error, one line an event."""

from __future__ import annotations

import logging
import re
import sys
from types import TracebackType
from typing import Any

from nextstate.error_text import safe_traceback

log = logging.getLogger(__name__)


class _Formatter(logging.Formatter):
    """One line an event; an error is shown by its traceback and its `safe_text`."""

    def formatException(self, ei: Any) -> str:
        return safe_traceback(ei[1])

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.name == "asyncio":  # a callback's arguments or a task's error would follow
            record.message = re.split(r"[\n(]", record.message, maxsplit=1)[0]
        return super().formatMessage(record)


def to_stderr() -> None:
    """Configures logging for this process, also for the error that ends it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    sys.excepthook = _log_last_error


def _log_last_error(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
    log.critical("the process ends", exc_info=error)
