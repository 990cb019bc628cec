"""Which sandbox a task asks for, by name: bubblewrap, docker:IMAGE or podman:IMAGE."""

from __future__ import annotations

import re

from nextstate.errors import ConfigError
from plugins.sandboxes.bubblewrap import Bubblewrap
from plugins.sandboxes.container import PROGRAMS, Container
from plugins.sandboxes.protocol import Folders, Limits, Sandbox

DEFAULT = "bubblewrap"
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}")


def make_sandbox(
    name: str, limits: Limits | None = None, folders: Folders | None = None
) -> Sandbox:
    """Raises ConfigError for a name that is not one, and for `plain`, which protects nothing."""
    if name == DEFAULT:
        return Bubblewrap(limits, folders)
    program, _, image = name.partition(":")
    if program in PROGRAMS and _IMAGE.fullmatch(image):
        return Container(program, image, limits, folders)
    if name in ("plain", "subprocess"):
        raise ConfigError(
            f"sandbox = {name!r}: it would let an agent do what you may. Expected bubblewrap, "
            "docker:IMAGE or podman:IMAGE"
        )
    raise ConfigError(f"sandbox = {name!r:.80}: expected bubblewrap, docker:IMAGE or podman:IMAGE")
