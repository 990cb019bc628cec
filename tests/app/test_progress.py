"""Long work is seen to go on: bars on a terminal, lines in a log."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from nextstate.app.progress import progress

SHOWN = "from nextstate.app.progress import progress\nwith progress() as step: step('texts', 3, 7)"


def test_a_log_gets_a_line_of_each_step_that_comes_late_enough(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with progress(every_s=0) as step:
        step("rows of samples", 12_000, None)
        step("engine judges", 3, 93)
    with progress() as step:  # half a minute has not passed
        step("engine judges", 4, 93)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "rows of samples: 12,000\nengine judges: 3 of 93\n")


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with os.fdopen(ours, "rb") as terminal:
        ended = subprocess.run(
            [sys.executable, "-c", SHOWN], stderr=theirs, env=environment, check=True
        )
        os.close(theirs)
        shown = terminal.read1(65536).decode()
    assert ended.returncode == 0
    assert "texts" in shown
    assert "3/7" in shown
