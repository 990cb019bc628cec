"""Reading a number from a page in Prometheus' text format."""

from __future__ import annotations

import re


def gauge_sum(text: str, name: str) -> float | None:
    """The metric's value summed over its label sets, or None where the page does not have it.

    Raises ValueError for a line of that name without a number.

    >>> gauge_sum('waiting{model="a}"} 2.0\\nwaiting{model="b"} 1.0 1700000000\\n', "waiting")
    3.0
    """
    found: float | None = None
    for line in text.split("\n"):
        if not line.startswith(name):
            continue
        rest = line[len(name) :]
        if rest[:1] == "{":  # only the value and a time stamp follow the last brace
            rest = rest[rest.rindex("}") + 1 :]
        elif not rest[:1].isspace():
            continue  # a longer name
        value, *_ = rest.split() or [""]
        found = (found or 0.0) + float(value)
    return found


def counts_by(text: str, name: str, label: str) -> dict[str, int]:
    """A counter's values by one label.

    >>> counts_by('lost{reason="a"} 2\\nlost{reason="b"} 1\\n', "lost", "reason")
    {'a': 2, 'b': 1}
    """
    found = re.findall(rf'^{name}\{{{label}="(\w+)"\}} (\d+)$', text, re.MULTILINE)
    return {value: int(count) for value, count in found}
