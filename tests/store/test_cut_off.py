"""A machine whose link to PostgreSQL drops every packet, beside one that goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.docs.messages import ROOT
from tests.postgresql_server import require_server

ALONE = ("unshare", "--net", "--mount-proc", "--pid", "--fork", "--kill-child")
"""What is killed in there takes PostgreSQL with it."""
pytestmark = pytest.mark.sqlite  # it brings its own server


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seconds", [4, pytest.param(30, marks=pytest.mark.soak)])
def test_a_link_that_is_cut_loses_nothing_and_holds_nobody_up_for_long(seconds: int) -> None:
    """`tests.store.cut_off` itself looks for what is lost or there twice.

    In 30 s both ends notice, and the machine that goes on takes the role of the learner. Before the
    server had a limit for what nobody acknowledges, nobody else could write for a minute.
    """
    require_server()
    if os.geteuid() or subprocess.run([*ALONE, "ip", "link"], check=False).returncode:
        pytest.skip("network namespaces with users of their own need root")
    folder = Path(tempfile.mkdtemp(prefix="nextstate-cut-"))
    try:
        done = subprocess.run(
            [*ALONE, sys.executable, "-m", "tests.store.cut_off", str(folder), str(seconds)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found = json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(folder)
    here, away = found["here"], found["away"]
    long = seconds > 25
    assert away["fenced"] == long
    assert bool(found["trained meanwhile"]) is long
    print(f"nothing was written for {here['longest_s']:.1f} s at most")
    assert here["longest_s"] < (50 if long else 25)  # the server gives up after 25 s
