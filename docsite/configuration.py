"""Writes docs/configuration.md: what the code takes, and what config.example.toml says of it.

`python -m docsite.configuration > docs/configuration.md`. A test fails while that file is older.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from judge.config import JudgeConfig
from learner.config import LearnerConfig
from nextstate.config import EngineConfig, PrivacyConfig, StoreConfig, keys
from proxy.config import AgentsConfig, LineageConfig, ProxyConfig

EXAMPLE = Path(__file__).parents[1] / "config.example.toml"
SECTIONS: Mapping[str, type] = {
    "store": StoreConfig,
    "engine": EngineConfig,
    "proxy": ProxyConfig,
    "lineages.NAME": LineageConfig,
    "agents": AgentsConfig,
    "judge": JudgeConfig,
    "learner": LearnerConfig,
    "privacy": PrivacyConfig,
}
_HEAD = """\
# Configuration

<!-- `python -m docsite.configuration` writes this: change config.example.toml or a config.py. -->

One TOML file holds all settings: `nextstate.toml` in the folder where you start, or the one that
`--config FILE` names. Keep in it only what you change; without a file all defaults hold. An unknown
key is an error that names the nearest one; a wrong value is an error that says what was expected.
Secrets stand in environment variables, and the file has the names of these. `nextstate doctor`
checks the file without starting anything.

```toml
[engine]
model = "Qwen/Qwen3-4B-Instruct-2507"

[judge]
kind = "rules,engine"
```

[config.example.toml](../config.example.toml) has the same keys in the form of a file, to copy from.
"""
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_PLAIN = {int: "a whole number", float: "a number", str: "a text", bool: "`true` or `false`"}


def document() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *(_section(name, kind) for name, kind in SECTIONS.items())])


def _section(name: str, kind: type) -> str:
    told = _comments(name)
    hints = get_type_hints(kind, include_extras=True)
    known = {field.name: field for field in fields(kind)}
    lines = [f"## [{name}]", ""]
    if said := told.get(""):
        lines += [said, ""]
    lines += ["| key | default | values | what it does |", "|---|---|---|---|"]
    for key in keys(kind):
        cells = (f"`{key}`", _default(known[key]), _values(hints[key]), told[key])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _comments(section: str) -> dict[str, str]:
    """What the example file says above each key; under "" what it says above the section."""
    text = EXAMPLE.read_text(encoding="utf-8")
    # The example of a lineage is commented out as a whole.
    text = re.sub(r"(?m)^# (\[lineages\.\w+\]\n(?:# .*\n)+)", _uncommented, text)
    found: dict[str, str] = {}
    said: list[str] = []
    inside = False
    for line in text.splitlines():
        if header := re.fullmatch(r"\[([a-z.]+)\]", line):
            inside = header[1] == section.replace("NAME", "alice")
            found |= {"": _prose(said)} if inside else {}
            said = []
        elif key := re.match(r"([a-z]\w*) = ", line):
            found |= {key[1]: _prose(said)} if inside else {}
            said = []
        else:
            said = [*said, line[1:]] if line else []
    return found


def _uncommented(found: re.Match[str]) -> str:
    return found[1].replace("\n# ", "\n")


def _prose(lines: list[str]) -> str:
    """Comment lines as one paragraph."""
    text = " ".join(line.strip().removesuffix(" \\") for line in lines)
    return text.replace("<", "&lt;").replace("*", r"\*")


def _default(field: Field[Any]) -> str:
    made = field.default if field.default_factory is MISSING else field.default_factory()
    value: object = [*cast("tuple[object, ...]", made)] if isinstance(made, tuple) else made
    return "`{}`" if value == {} else f"`{json.dumps(value)}`"


def _values(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        base, *limits = get_args(hint)
        return " ".join([_values(base), *_bounds(limits)])
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return "a list of texts"
    if get_origin(hint) is UnionType:
        return " or ".join(map(_values, get_args(hint)))
    if get_origin(hint) is not None:
        return "a table"
    return _PLAIN[hint]


def _bounds(limits: list[Any]) -> Iterator[str]:
    said = [
        f"{words} {getattr(limit, name):g}"
        for limit in limits
        for name, words in _BOUNDS.items()
        if not isinstance(getattr(limit, name, None), NoneType)
    ]
    if said:
        yield " and ".join(said)


if __name__ == "__main__":
    sys.stdout.write(document())
