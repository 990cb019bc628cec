"""When the learner may compute: its window, its patience with a busy engine, and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, time, timedelta

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from learner.config import LearnerConfig
from learner.schedule import Schedule, contains, parse_schedule
from nextstate.errors import ConfigError, EngineError

MONDAY = datetime(2026, 11, 23)


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
    return Schedule("window", day.wait, window=parse_schedule(text)[1], local_time=lambda: day.now)


TIMES = st.times().map(lambda at: at.replace(second=0, microsecond=0))


@given(TIMES, TIMES, st.times())
def test_a_window_contains_its_start_and_what_follows_up_to_its_end(
    start: time, end: time, moment: time
) -> None:
    assume(start != end)
    _, window = parse_schedule(f"{start:%H:%M}-{end:%H:%M}")
    assert window is not None
    ahead = [
        (at.hour * 60 + at.minute - start.hour * 60 - start.minute) % 1440 for at in (moment, end)
    ]
    assert contains(window, moment) is (ahead[0] < ahead[1])


@pytest.mark.parametrize(
    "text",
    ["", "22-7", "22:00-07:00,", "fri 22:00-07:00", "22:60-07:00", "22:00-24:00", "07:00-07:00"],
)
def test_a_window_that_means_nothing_is_refused_with_its_key(text: str) -> None:
    expected = rf"\[learner\] schedule = {text!r}: expected always, idle, or two different times"
    with pytest.raises(ConfigError, match=expected):
        LearnerConfig(schedule=text)


@pytest.mark.parametrize(("text", "opens"), [("13:00-14:00", 13), ("22:00-07:00", 22)])
def test_an_update_may_begin_inside_its_window_only_and_it_says_once_that_it_waits(
    text: str, opens: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    day = Day(MONDAY + timedelta(hours=12))
    schedule = window(day, text)
    while not schedule.may_update():
        day.wait(60)
    assert day.now == MONDAY + timedelta(hours=opens)
    day.wait(12 * 3600)
    assert not schedule.may_update()
    assert [r.message.split()[-1] for r in caplog.records] == [f"until={opens}:00:00"] * 2


def test_an_update_that_has_begun_is_finished_after_its_window() -> None:
    day = Day(MONDAY + timedelta(hours=8))
    window(day, "22:00-07:00").before_pass()
    assert day.waits == []


def test_a_micro_batch_waits_until_the_engine_is_idle() -> None:
    day = Day()
    answers = iter([3, 1, 0, 5])
    schedule = idle(day, lambda: next(answers))
    schedule.before_pass()
    assert len(day.waits) == 2
    assert next(answers) == 5, "an idle engine is asked once"


@given(st.floats(0, 600))
def test_constant_traffic_holds_a_micro_batch_no_longer_than_the_patience(patience: float) -> None:
    day = Day()
    schedule = idle(day, lambda: 1, patience)
    for n in (1, 2):
        schedule.before_pass()
        assert day.elapsed_s == pytest.approx(n * patience)


def test_an_engine_that_does_not_answer_counts_as_busy(caplog: pytest.LogCaptureFixture) -> None:
    day = Day()

    def failing() -> int:
        raise EngineError("GET /metrics failed: it starts")

    idle(day, failing).before_pass()
    assert day.elapsed_s == pytest.approx(60)
    assert len([r for r in caplog.records if "it starts" in r.message]) == 1


def test_always_asks_nobody_and_waits_for_nothing() -> None:
    day = Day()
    schedule = Schedule("always", day.wait)
    assert schedule.may_update()
    schedule.before_pass()
    assert day.waits == []


def test_ending_the_learner_interrupts_a_real_wait() -> None:
    stop, asked = threading.Event(), threading.Event()

    def live() -> int:
        asked.set()
        return 1

    schedule = Schedule("idle", stop.wait, live_requests=live, patience_s=1e6)
    waiting = threading.Thread(target=schedule.before_pass)
    waiting.start()
    assert asked.wait(30)
    stop.set()
    waiting.join(30)
    assert not waiting.is_alive()
