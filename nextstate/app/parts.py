"""What a running supervisor says of its parts, in a file for `nextstate status`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from nextstate.records import Json
from nextstate.wire import json_object, obj


def parts_file(state_dir: Path) -> Path:
    """Where it is said."""
    return state_dir / "parts.json"


def write_parts(state_dir: Path, states: Mapping[str, str]) -> None:
    """Says the state of each part, in this process's name."""
    file = parts_file(state_dir)
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps({"pid": os.getpid(), "parts": dict(states)}))
    draft.replace(file)


def read_parts(state_dir: Path) -> Json:
    """The state of each part; {} without a supervisor that lives."""
    try:
        said = json_object(parts_file(state_dir).read_bytes()) or {}
    except OSError:
        return {}
    return obj(said.get("parts")) if _lives(said.get("pid")) else {}


def _lives(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:  # it is another user's
        return True
    except (OSError, OverflowError):
        return False
    return True
