"""How much memory is free for the learner, on this machine and in its container."""

from __future__ import annotations

import re
from pathlib import Path

_ROOT = Path("/")


def free_ram(root: Path = _ROOT) -> int | None:
    """Bytes that may be used without swapping, or None on a system that does not tell (no /proc).

    It is the least of what the kernel calls available and of what every control group from the
    process's own upwards has left; `root` is the file system's.
    """
    try:
        available = _kib((root / "proc/meminfo").read_text(), "MemAvailable")
    except (OSError, ValueError):
        return None
    return min([available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> list[int]:
    """What each control group with a limit has left, in bytes: of version 2 and of version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            left += _left(root / "sys/fs/cgroup", path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes"
            left += _left(root / "sys/fs/cgroup/memory", path, *names)
    return left


def _left(mount: Path, path: str, limit_name: str, usage_name: str) -> list[int]:
    own = mount / path.lstrip("/")
    found: list[int] = []
    for folder in (own, *own.parents):
        if not folder.is_relative_to(mount):
            break
        try:
            limit = (folder / limit_name).read_text().strip()
            usage = int((folder / usage_name).read_text())
            cache = _inactive_file((folder / "memory.stat").read_text())
        except (OSError, ValueError):
            continue
        if limit != "max":
            # The kernel gives the cache of files back before it refuses memory.
            found.append(max(0, int(limit) - usage + cache))
    return found


def _inactive_file(stat: str) -> int:
    """Of a group's `memory.stat`: cached bytes of files not used lately, its children's too."""
    found = re.search(r"^total_inactive_file (\d+)$", stat, re.MULTILINE) or re.search(
        r"^inactive_file (\d+)$", stat, re.MULTILINE
    )
    return int(found[1]) if found else 0


def _kib(meminfo: str, name: str) -> int:
    found = re.search(rf"^{name}: +(\d+) kB$", meminfo, re.MULTILINE)
    if found is None:
        raise ValueError(f"/proc/meminfo has no {name}")
    return int(found[1]) * 1024
