"""Builds the wheel of a commit and says how, in an in-toto statement with SLSA's provenance.

    python requirements/wheel.py --out dist          # what `make wheel` runs

Only what is committed gets in; the time is the commit's, and the modes of files depend on no umask.
So whoever has the commit and the same tools builds the same bytes, and the same statement. Nobody
has signed it: it tells how to check a wheel, and not who made it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("pip", "setuptools")
_PIP = ["-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
COMMAND = [*_PIP, "--no-deps", "--no-build-isolation"]
"""What Python is given, besides folders."""


def build(out: Path) -> Path:
    """Writes the wheel of HEAD into a folder, with its statement beside it. Returns the wheel."""
    commit, epoch = _git("log", "-1", "--format=%H %ct").decode().split()
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "source"), Path(folder, "made")
        with tarfile.open(
            fileobj=BytesIO(_git("-c", "tar.umask=0022", "archive", commit))
        ) as archive:
            archive.extractall(source, filter="data")
        argv = [sys.executable, *COMMAND, "--wheel-dir", str(made), str(source)]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": epoch}
        subprocess.run(argv, check=True, env=environment, umask=0o022)
        (wheel,) = made.glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        kept = out / wheel.name
        kept.write_bytes(wheel.read_bytes())
    text = json.dumps(statement(kept, commit, epoch), indent=2)
    kept.with_suffix(".intoto.json").write_text(text + "\n")
    return kept


def statement(wheel: Path, commit: str, epoch: str) -> dict[str, object]:
    """What is said of a wheel: https://slsa.dev/spec/v1.0/provenance."""
    tools = {"python": platform.python_version(), **{name: version(name) for name in TOOLS}}
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    made_of = [{"name": "nextstate", "digest": {"gitCommit": commit}}]
    made_of += [
        {"name": name, "uri": f"pkg:{'generic' if name == 'python' else 'pypi'}/{name}@{number}"}
        for name, number in tools.items()
    ]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": wheel.name, "digest": {"sha256": digest}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:nextstate:wheel:1",
                "externalParameters": {"command": ["python", *COMMAND], "SOURCE_DATE_EPOCH": epoch},
                "resolvedDependencies": made_of,
            },
            "runDetails": {"builder": {"id": "urn:nextstate:requirements/wheel.py"}},
        },
    }


def _git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    print(build(parser.parse_args().out))
