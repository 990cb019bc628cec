"""How much memory is free, and how much a process and its children hold."""

from __future__ import annotations

import re
from pathlib import Path

_ROOT = Path("/")


def free_ram(root: Path = _ROOT) -> int | None:
    """Bytes that can be used without swapping, or None on a system without /proc.

    The minimum of what the kernel reports as available and what each control group of the process
    (version 2) has left. `root` is the root of the file system.
    """
    try:
        available = kib((root / "proc/meminfo").read_text(), "MemAvailable")
    except (OSError, ValueError):
        return None
    return min([available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> list[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    mount, left = root / "sys/fs/cgroup", list[int]()
    for path in (line[3:] for line in lines if line.startswith("0::")):
        own = mount / path.lstrip("/")
        for folder in (own, *own.parents):
            try:
                limit = (folder / "memory.max").read_text().strip()
                usage = int((folder / "memory.current").read_text())
                cache = re.search(
                    r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.M
                )
            except (OSError, ValueError):
                continue
            if limit != "max":  # the kernel drops cached files before it refuses memory
                left.append(max(0, int(limit) - usage + (int(cache[1]) if cache else 0)))
    return left


def kib(text: str, name: str) -> int:
    """Bytes of a `Name:  123 kB` line; raises ValueError without it."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"no {name} in /proc")
    return int(found[1]) * 1024


def held_by(pid: int, root: Path = _ROOT) -> int:
    """Bytes of their own that a process and all processes below it hold; 0 if it has ended."""
    parents: dict[int, list[int]] = {}
    for folder in (root / "proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents.setdefault(int(after_name[1]), []).append(int(folder.name))
    held, left = 0, [pid]
    while left:
        one = left.pop()
        left += parents.get(one, [])
        try:
            held += kib((root / f"proc/{one}/status").read_text(), "RssAnon")
        except (OSError, ValueError):
            continue
    return held
