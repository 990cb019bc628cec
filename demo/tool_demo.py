"""`nextstate demo --tools`: a small policy learns to call tools.

The people, cities, days and numbers of its held-out tasks are in no task that trains.
"""

from __future__ import annotations

from pathlib import Path

from demo.lesson import Lesson, learn
from nextstate.errors import StartError
from plugins.environments.tools import ToolsKind

FOLDER = Path(__file__).parent / "tool_policy_files"
TOOLS = Lesson("tools", ToolsKind(), FOLDER, goal=0.8, updates=18, max_calls=6)


def run_tool_demo(*, seed: int, updates: int, out: Path) -> int:
    """Runs the demo; 0 if the held-out score reached the goal. `updates` 0: the default."""
    if not (FOLDER / "model.safetensors").is_file():
        raise StartError(f"the policy is missing from {FOLDER}: run `make tool-policy`")
    return learn(TOOLS, seed=seed, updates=updates, out=out)
