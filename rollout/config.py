"""`[rollout]`: which environment `nextstate up` plays beside people's traffic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le

from nextstate.records import MAIN_LINEAGE

MOST_PARALLEL = 256


@dataclass(frozen=True, slots=True)
class RolloutRecipe:
    """What nobody needs to choose. No file sets it; benchmarks and tests may, in code."""

    group_size: Annotated[int, Ge(1)] = 8
    """Attempts at each task."""
    max_calls: Annotated[int, Ge(1)] = 10
    """Replies of the model in an episode."""
    deadline_s: Annotated[float, Gt(0)] = 600.0
    """Of an episode, from its first step."""
    share: Annotated[float, Gt(0), Le(1)] = 0.2
    """The share of the time in which an episode is played while people use the engine."""
    exam_tasks: Annotated[int, Ge(1)] = 32
    """Held-out tasks that a candidate and its parent play before the candidate serves."""
    lineage: str = MAIN_LINEAGE
    """Whom the episodes train."""


@dataclass(frozen=True, slots=True)
class RolloutConfig(RolloutRecipe):
    """The keys of `[rollout]`."""

    environment: str = ""
    """A file of plugins/environments/, as `terminal`, or a `module:function`; empty: none."""
    tasks: str = ""
    """A file with one task a line; empty: tasks that the environment generates without end."""
    parallel: Annotated[int, Ge(1), Le(MOST_PARALLEL)] = 8
    """Episodes at once."""

    @property
    def name(self) -> str:
        """The environment's name in the store."""
        return environment_name(self.environment)

    @property
    def open_s(self) -> float:
        """The deadline of a group: its episodes may have to wait for places after each other."""
        return open_s(self.deadline_s, self.group_size, self.parallel)


def environment_name(plugin: str) -> str:
    """The name of the environment of a plugin.

    >>> environment_name("terminal"), environment_name("my_module:create")
    ('terminal', 'my_module')
    """
    return plugin.rpartition(":")[0] or plugin


def open_s(deadline_s: float, group_size: int, parallel: int) -> float:
    """How long the episodes of a group may be open, if some wait for the places of others."""
    return deadline_s * (1 + math.ceil(group_size / parallel))
