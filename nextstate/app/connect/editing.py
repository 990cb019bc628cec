"""An agent's settings file with the proxy written into it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable

from nextstate.app.connect import json5_edit, toml_edit
from nextstate.app.connect.agents import Edit, FileAgent
from nextstate.app.connect.json5_text import parse, plain
from nextstate.app.connect.settings_file import Found
from nextstate.app.connect.target import Target
from nextstate.errors import ConfigError
from nextstate.records import Json
from nextstate.wire import obj


def connected(agent: FileAgent, target: Target, found: Found, plugin: bool) -> str:
    """The text of the agent's settings with the proxy in it, and with NextState's plugin if asked.

    Raises ConfigError if the file is malformed or holds something unexpected.
    """

    def edits(holds: Json) -> list[Edit]:
        more = agent.plugin(holds) if plugin and agent.plugin else []
        return agent.edits(target, holds) + more

    try:
        return (_toml if agent.language == "toml" else _json5)(found.text, edits)
    except ValueError as error:
        raise ConfigError(
            f"{found.path}: {error}; nothing was changed. Correct the file, or name another with "
            "--file"
        ) from None


def settings_in(agent: FileAgent, text: str) -> Json:
    """What the text of an agent's settings holds."""
    return tomllib.loads(text) if agent.language == "toml" else obj(plain(parse(text)))


def _json5(text: str, edits: Callable[[Json], list[Edit]]) -> str:
    text = text if text.strip() else "{}\n"
    for path, value in edits(obj(plain(parse(text)))):
        text = json5_edit.set_value(text, path, value)
    return text


def _toml(text: str, edits: Callable[[Json], list[Edit]]) -> str:
    for path, value in edits(tomllib.loads(text)):
        text = toml_edit.set_value(text, tuple(map(str, path)), value)
    return text
