"""When the learner may compute: its windows, its patience with a busy engine, and how it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from learner.config import LearnerConfig
from learner.schedule import Schedule, Window, next_opening, parse_windows
from nextstate.engine.client import EngineClient
from nextstate.errors import ConfigError, EngineError
from nextstate.prometheus import metric_sum

MONDAY = datetime(2026, 11, 23)
WEEK_MINUTES = 7 * 24 * 60
VLLM_PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a {} b"} 2.0
vllm:num_requests_running{engine="1",model_name="a {} b"} 1.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="a {} b"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0
"""


@st.composite
def windows(draw: st.DrawFn) -> Window:
    start = draw(st.integers(0, 1439))
    end = draw(st.integers(1, 1440).filter(lambda minute: minute != start))
    return Window(start, end, draw(st.frozensets(st.integers(0, 6), min_size=1)))


def minutes_of(window: Window) -> set[int]:
    """Every minute of the week that lies in the window, counted out."""
    length = (window.end - window.start) % 1440 or 1440
    return {
        (day * 1440 + window.start + n) % WEEK_MINUTES for day in window.days for n in range(length)
    }


class Day:
    """A clock that only waiting moves; `ends_after` waits it says that the learner must end."""

    def __init__(self, now: datetime = MONDAY, ends_after: int = 10_000) -> None:
        self.now = now
        self.elapsed_s = 0.0
        self.waits: list[float] = []
        self._ends_after = ends_after

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += timedelta(seconds=seconds)
        self.elapsed_s += seconds
        return len(self.waits) >= self._ends_after

    def seconds(self) -> float:
        return self.elapsed_s


def idle(day: Day, live: Callable[[], int], patience_s: float = 60.0) -> Schedule:
    return Schedule("idle", day.wait, live_requests=live, patience_s=patience_s, clock=day.seconds)


def window(day: Day, text: str) -> Schedule:
    return Schedule("window", day.wait, windows=parse_windows(text), local_time=lambda: day.now)


@pytest.mark.parametrize(
    ("at", "inside"),
    [("21:59", False), ("22:00", True), ("00:00", True), ("06:59", True), ("07:00", False)],
)
def test_a_window_may_cross_midnight(at: str, inside: bool) -> None:
    (night,) = parse_windows("22:00-07:00")
    assert night.contains(datetime.fromisoformat(f"2026-11-24 {at}")) is inside


def test_days_are_those_on_which_a_window_begins() -> None:
    (friday_night,) = parse_windows("fri 22:00-07:00")
    assert friday_night.contains(datetime(2026, 11, 28, 6, 59))  # Saturday morning
    assert not friday_night.contains(datetime(2026, 11, 27, 6, 59))  # Friday morning
    (weekend,) = parse_windows("sat-sun 00:00-24:00")
    assert weekend.days == {5, 6}
    (over_sunday,) = parse_windows("sat-mon 00:00-24:00")
    assert over_sunday.days == {5, 6, 0}


@given(windows(), st.integers(0, WEEK_MINUTES - 1), st.integers(0, 59))
def test_a_window_contains_exactly_its_minutes(window: Window, minute: int, second: int) -> None:
    moment = MONDAY + timedelta(minutes=minute, seconds=second)
    assert window.contains(moment) is (minute in minutes_of(window))


@given(st.lists(windows(), min_size=1, max_size=3), st.integers(0, WEEK_MINUTES - 1))
def test_the_next_opening_is_the_first_minute_inside(given: list[Window], minute: int) -> None:
    inside = set().union(*map(minutes_of, given))
    ahead = next(n for n in range(WEEK_MINUTES) if (minute + n) % WEEK_MINUTES in inside)
    moment = MONDAY + timedelta(minutes=minute)
    assert next_opening(given, moment) == moment + timedelta(minutes=ahead)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not like"),
        ("22-7", "is not like"),
        ("22:00-07:00,", "is not like"),
        ("fun 22:00-07:00", "is not like"),
        ("22:60-07:00", "'22:60' is not a time of day"),
        ("22:00-24:01", "'24:01' is not a time of day"),
        ("24:00-07:00", "a day begins at 00:00"),
        ("22:00-00:00", "ends at 24:00"),
        ("07:00-07:00", "is empty"),
    ],
)
def test_a_window_that_means_nothing_is_refused_with_its_key(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[learner\] window = {text!r}: .*{reason}"):
        LearnerConfig(window=text)


def test_an_update_outside_every_window_waits_for_the_next() -> None:
    day = Day(MONDAY + timedelta(hours=12))
    window(day, "13:00-14:00, 22:00-07:00").before_update()
    assert day.now == MONDAY + timedelta(hours=13)
    assert max(day.waits) <= 60, "a clock that is set is noticed within a minute"
    window(day, "13:00-14:00").before_update()
    assert day.now == MONDAY + timedelta(hours=13)


def test_an_update_that_has_begun_is_finished_after_its_window() -> None:
    day = Day(MONDAY + timedelta(hours=8))
    window(day, "22:00-07:00").before_micro_batch()
    assert day.waits == []


def test_whoever_ends_the_learner_ends_the_wait_for_a_window() -> None:
    day = Day(MONDAY + timedelta(hours=8), ends_after=3)
    window(day, "22:00-07:00").before_update()
    assert len(day.waits) == 3


def test_a_micro_batch_waits_until_the_engine_is_idle() -> None:
    day = Day()
    answers = iter([3, 1, 0, 5])
    schedule = idle(day, lambda: next(answers))
    schedule.before_micro_batch()
    assert len(day.waits) == 2
    assert next(answers) == 5, "an idle engine is asked once"


@given(st.floats(0, 600))
def test_constant_traffic_holds_a_micro_batch_no_longer_than_the_patience(patience: float) -> None:
    day = Day()
    schedule = idle(day, lambda: 1, patience)
    for n in (1, 2):
        schedule.before_micro_batch()
        assert day.elapsed_s == pytest.approx(n * patience)


def test_an_engine_that_does_not_answer_counts_as_busy(caplog: pytest.LogCaptureFixture) -> None:
    day = Day()

    def failing() -> int:
        raise EngineError("GET /metrics failed: it starts")

    idle(day, failing).before_micro_batch()
    assert day.elapsed_s == pytest.approx(60)
    assert len([r for r in caplog.records if "it starts" in r.message]) == 1


def test_always_asks_nobody_and_waits_for_nothing() -> None:
    day = Day()
    schedule = Schedule("always", day.wait)
    schedule.before_update()
    schedule.before_micro_batch()
    assert day.waits == []


def test_ending_the_learner_interrupts_a_real_wait() -> None:
    stop, asked = threading.Event(), threading.Event()

    def live() -> int:
        asked.set()
        return 1

    schedule = Schedule("idle", stop.wait, live_requests=live, patience_s=1e6)
    waiting = threading.Thread(target=schedule.before_micro_batch)
    waiting.start()
    assert asked.wait(30)
    stop.set()
    waiting.join(30)
    assert not waiting.is_alive()


def test_a_gauge_is_summed_over_its_labels_and_no_other_name() -> None:
    assert metric_sum(VLLM_PAGE, "vllm:num_requests_running") == 3
    assert metric_sum(VLLM_PAGE, "vllm:num_requests_waiting") == 4
    assert metric_sum(VLLM_PAGE, "vllm:num_requests") is None
    assert metric_sum("up 1 1700000000", "up") == 1
    with pytest.raises(ValueError, match="could not convert"):
        metric_sum('up{a="b"}', "up")


labels = st.dictionaries(st.from_regex(r"[a-z]+", fullmatch=True), st.text("ab {}=,.1"), max_size=3)


@given(st.lists(st.tuples(labels, st.integers(0, 10**6)), min_size=1))
def test_whatever_stands_in_the_labels_the_sum_is_of_the_values(
    series: list[tuple[dict[str, str], int]],
) -> None:
    page = ""
    for label_set, value in series:
        inner = ",".join(f'{name}="{text}"' for name, text in label_set.items())
        page += f"gauge{{{inner}}} {float(value)}\n"
    assert metric_sum(page, "gauge") == sum(value for _, value in series)


async def ask(page: str) -> int:
    """What a client reads off an engine whose metrics are `page`."""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text=page)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        async with EngineClient(f"http://{host}:{port}", "m") as engine:
            return await engine.live_requests()
    finally:
        await runner.cleanup()


def test_live_requests_are_those_that_run_and_those_that_wait() -> None:
    assert asyncio.run(ask(VLLM_PAGE)) == 7


@pytest.mark.parametrize("page", ["", "vllm:num_requests_running 1\n"])
def test_an_engine_without_the_gauges_is_named_with_what_helps(page: str) -> None:
    with pytest.raises(EngineError, match=r"--disable-log-stats.*\[learner\] schedule"):
        asyncio.run(ask(page))


@pytest.mark.parametrize("value", ["NaN", "+Inf", "many"])
def test_a_gauge_that_is_no_count_is_an_engine_error(value: str) -> None:
    page = f"vllm:num_requests_running {value}\nvllm:num_requests_waiting 0\n"
    with pytest.raises(EngineError, match="cannot be read"):
        asyncio.run(ask(page))


def test_a_negative_patience_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[learner\] idle_patience_s = -1"):
        replace(LearnerConfig(), idle_patience_s=-1)
