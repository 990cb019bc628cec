"""Metrics are read from a page in Prometheus' text format, whatever stands in the labels."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.prometheus import metric_sum

VLLM_PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a {} b"} 2.0
vllm:num_requests_running{engine="1",model_name="a {} b"} 1.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="a {} b"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0
"""


def test_a_gauge_is_summed_over_its_labels_and_no_other_name() -> None:
    assert metric_sum(VLLM_PAGE, "vllm:num_requests_running") == 3
    assert metric_sum(VLLM_PAGE, "vllm:num_requests_waiting") == 4
    assert metric_sum(VLLM_PAGE, "vllm:num_requests") is None
    assert metric_sum("up 1 1700000000", "up") == 1
    with pytest.raises(ValueError, match="could not convert"):
        metric_sum('up{a="b"}', "up")


labels = st.dictionaries(st.text("abz", min_size=1), st.text("ab {}=,.1"), max_size=3)


@given(st.lists(st.tuples(labels, st.integers(0, 10**6)), min_size=1))
def test_whatever_stands_in_the_labels_the_sum_is_of_the_values(
    series: list[tuple[dict[str, str], int]],
) -> None:
    page = ""
    for label_set, value in series:
        inner = ",".join(f'{name}="{text}"' for name, text in label_set.items())
        page += f"gauge{{{inner}}} {float(value)}\n"
    assert metric_sum(page, "gauge") == sum(value for _, value in series)
