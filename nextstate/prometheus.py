"""Reading metrics from a page in Prometheus' text format."""

from __future__ import annotations

import re
from collections.abc import Iterator

_LABEL = re.compile(r'\b([a-zA-Z_]\w{0,199})="((?:[^"\\]|\\.)*)"')


def metric_values(text: str, name: str) -> Iterator[tuple[dict[str, str], float]]:
    """Each label set of a metric with its value; nothing if the page does not have the metric.

    Raises ValueError for a line of that name without a number.

    >>> list(metric_values('lost{reason="a"} 2\\nlost_total 7\\n', "lost"))
    [({'reason': 'a'}, 2.0)]
    """
    for line in text.split("\n"):
        if not line.startswith(name):
            continue
        labels, after = "", line[len(name) :]
        if after[:1] == "{":  # a label's value may hold braces, what follows the labels does not
            labels, _, after = after.rpartition("}")
        elif not after[:1].isspace():
            continue  # a metric with a longer name
        value, *_ = after.split() or [""]  # a time stamp may follow
        yield dict(_LABEL.findall(labels)), float(value)


def metric_sum(text: str, name: str) -> float | None:
    """The metric's value summed over its label sets; None if the page does not have it.

    Raises ValueError as `metric_values` does.

    >>> metric_sum('waiting{model="a}"} 2.0\\nwaiting{model="b"} 1.0 1700000000\\n', "waiting")
    3.0
    """
    values = [value for _, value in metric_values(text, name)]
    return sum(values) if values else None
