"""An agent's settings file with the proxy written into it."""

from __future__ import annotations

import tomllib

from nextstate.app.connect import json5_edit, toml_edit
from nextstate.app.connect.agents import FileAgent
from nextstate.app.connect.json5_text import parse, plain
from nextstate.app.connect.settings_file import Found
from nextstate.app.connect.target import Target
from nextstate.errors import ConfigError
from nextstate.wire import obj


def connected(agent: FileAgent, target: Target, found: Found) -> str:
    """The text of the agent's settings with the proxy in it.

    Raises ConfigError if the file is malformed or holds something unexpected.
    """
    change = _toml if agent.language == "toml" else _json5
    try:
        return change(agent, target, found.text)
    except ValueError as error:
        raise ConfigError(
            f"{found.path}: {error}; nothing was changed. Correct the file, or name another with "
            "--file"
        ) from None


def _json5(agent: FileAgent, target: Target, text: str) -> str:
    text = text if text.strip() else "{}\n"
    for path, value in agent.edits(target, obj(plain(parse(text)))):
        text = json5_edit.set_value(text, path, value)
    return text


def _toml(agent: FileAgent, target: Target, text: str) -> str:
    for path, value in agent.edits(target, tomllib.loads(text)):
        text = toml_edit.set_value(text, tuple(map(str, path)), value)
    return text
