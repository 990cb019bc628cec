"""What a sandbox is: a place where one hostile command after the other runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

MOST_COMMAND_BYTES = 64 << 10
"""The kernel takes at most 128 KiB for one argument."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one command may use."""

    wall_s: float = 30.0
    cpu_s: int = 20
    """Of each process."""
    memory_mb: int = 512
    """Of each process."""
    processes: int = 64
    file_mb: int = 16
    """The size of each file."""
    folder_mb: int = 64
    """The size of each folder, as /task and /tmp."""
    output_bytes: int = 256 << 10
    """What is read of the output; the command's next write fails."""
    grace_s: float = 20.0
    """For unpacking, packing and a busy machine; after `wall_s` and this the sandbox is killed."""


@dataclass(frozen=True, slots=True)
class Folders:
    """The folders of a sandbox that commands may write to, beside /tmp."""

    work: str = "/task"
    """Where a command begins; only its files are kept."""
    others: Sequence[str] = ()
    """Empty folders."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What one command did."""

    exit_code: int
    """As bash tells it: 124 after its seconds, 128 and more for a signal."""
    output: bytes
    """Both streams in the order of their writes."""
    cut: bool
    """Whether there was more output than is read."""
    files: bytes | None
    """What the folder for work holds now; None: the command ended the sandbox, or left too much."""


class Sandbox(Protocol):
    """Runs commands, each in a sandbox of its own."""

    @property
    def limits(self) -> Limits: ...

    async def check_machine(self) -> None:
        """Raises StartError unless a sandbox works here."""
        ...

    async def run(
        self, command: str, files: bytes, variables: Mapping[str, str] | None = None
    ) -> Ran:
        """Runs a command of bash in the folder for work.

        A command without NUL, of at most 64 KiB. `files` may be several tar archives in a row.
        Raises RolloutError if no sandbox could be made.
        """
        ...
