"""The state of each child process: a file from the supervisor for `nextstate status`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from nextstate.records import Json
from nextstate.wire import json_object, obj


def child_states_file(state_dir: Path) -> Path:
    """The file; it exists only while a supervisor runs."""
    return state_dir / "children.json"


def write_child_states(state_dir: Path, states: Mapping[str, str]) -> None:
    """Writes the state of each child, with this process as the supervisor."""
    file = child_states_file(state_dir)
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps({"supervisor": os.getpid(), "children": dict(states)}))
    draft.replace(file)


def read_child_states(state_dir: Path) -> Json:
    """The state of each child; {} if no supervisor lives."""
    try:
        found = json_object(child_states_file(state_dir).read_bytes()) or {}
    except OSError:
        return {}
    return obj(found.get("children")) if _lives(found.get("supervisor")) else {}


def _lives(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's process
        return True
    except (OSError, OverflowError):
        return False
    return True
