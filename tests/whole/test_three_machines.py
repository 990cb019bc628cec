"""The way from one machine to three, as docs/scale.md says it, with a fail-over of the database."""

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

BLOCKS = 12
"""Of commands and configurations."""
ALONE = ("unshare", "--net", "--mount")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cut_s", [4, pytest.param(30, marks=pytest.mark.soak)])
def test_the_commands_of_the_document_lead_to_three_machines_and_past_a_lost_database(
    cut_s: int,
) -> None:
    require_server()
    if os.geteuid() or subprocess.run([*ALONE, "ip", "link"], check=False).returncode:
        pytest.skip("network namespaces with users of their own need root")
    folder = Path(tempfile.mkdtemp(prefix="nextstate-three-"))
    folder.chmod(0o755)
    try:
        done = subprocess.run(
            [*ALONE, sys.executable, "-m", "tests.whole.three_machines", str(folder), str(cut_s)],
            cwd=ROOT,
            umask=0o022,  # commands that ran in this process made it stricter
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found = json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(folder)
    assert found["before"] > 5  # replies went on while the link was down
    assert found["after"] > found["before"]
    assert found["none_lost"]
    assert found["blocks"] == BLOCKS
