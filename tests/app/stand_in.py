"""Runs in the place of vLLM's server: a scripted engine, of a version if its folder has probes."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from nextstate.engine.whole import PROBE_FILE
from tests.engine import whole_server
from tests.whole.three_machines import engine


def main() -> None:
    """Takes vLLM's arguments."""
    given = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
    host, port, folder = given["--host"], given["--port"], given["--model"]
    if Path(folder, PROBE_FILE).exists():
        whole_server.main(port, given["--served-model-name"], folder, host)
    else:
        asyncio.run(engine(host, int(port)))
