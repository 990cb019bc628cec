from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judge.pace import Counted
from nextstate.errors import EngineError, JudgeError
from nextstate.hooks import Evidence
from nextstate.pace import LONGEST_REST_S, LOOK_S, QUIET_S, Pace, rest_s
from nextstate.records import Vote
from tests.judge.test_stage import ScriptedJudge


@dataclass
class Engine:
    """A scripted engine with `live` requests; None: it cannot tell."""

    live: int | None = 0
    asked: int = 0
    now: float = 100.0

    async def live_requests(self) -> int:
        self.asked += 1
        if self.live is None:
            raise EngineError("away")
        return self.live

    def clock(self) -> float:
        return self.now


def praise(_evidence: Evidence, _call: int) -> Vote:
    return Vote(1)


def judge_on(engine: Engine) -> Counted:
    return Counted(ScriptedJudge(praise), engine.live_requests)


def pace_on(engine: Engine, share: float = 0.1) -> Pace:
    return Pace(share, judge_on(engine).agents, engine.clock)


def allowed(pace: Pace, wanted: int = 16, held: int = 0) -> int:
    return asyncio.run(pace.allowed(wanted, held))


def test_on_an_engine_that_agents_do_not_use_the_judge_has_no_limit() -> None:
    engine = Engine()
    judge = judge_on(engine)
    pace = Pace(0.1, judge.agents, engine.clock)
    assert allowed(pace) == 16
    engine.now += LOOK_S
    engine.live = judge.asking = 6
    assert allowed(pace, 14, held=2) == 14


def test_on_an_engine_without_counts_the_judge_has_no_limit_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine(None)
    pace = pace_on(engine)
    for _ in range(3):
        assert allowed(pace) == 16
        engine.now += LOOK_S
    assert engine.asked == 3
    assert caplog.text.count("cannot see agents") == 1


def test_while_agents_use_the_engine_it_takes_one_turn_at_a_time_and_rests() -> None:
    engine = Engine(1)
    pace = pace_on(engine)
    assert allowed(pace) == 1
    assert allowed(pace, held=1) == 0
    engine.now += 0.5
    pace.worked(0.5)
    assert allowed(pace) == 0
    engine.now += 4.4
    assert allowed(pace) == 0
    engine.now += 0.2
    assert allowed(pace) == 1


def test_the_limit_ends_some_time_after_the_last_request_of_an_agent() -> None:
    engine = Engine(1)
    pace = pace_on(engine)
    assert allowed(pace) == 1
    engine.live = 0
    engine.now += QUIET_S - 0.1
    assert allowed(pace) == 1
    engine.now += 0.2
    assert allowed(pace) == 16


def test_an_agent_is_seen_beside_the_judges_own_votes() -> None:
    engine = Engine(7)
    judge = judge_on(engine)
    judge.asking = 6
    assert allowed(Pace(0.1, judge.agents, engine.clock), held=2) == 0


def test_votes_that_end_while_the_engine_is_asked_do_not_count_as_an_agents_requests() -> None:
    async def ending() -> int:
        judge.asking = 0
        return 3

    judge = Counted(ScriptedJudge(praise), ending)
    judge.asking = 3
    assert not asyncio.run(judge.agents())


def test_votes_under_way_are_counted_whether_they_succeed_or_not() -> None:
    seen: list[int] = []

    def answer(_: Evidence, call: int) -> Vote | Exception:
        seen.append(judge.asking)
        return Vote(1) if call == 1 else JudgeError("no")

    judge = Counted(ScriptedJudge(answer), Engine().live_requests)
    evidence = Evidence((), "r", ())
    assert asyncio.run(judge.vote(evidence, 1)) == Vote(1)
    with pytest.raises(JudgeError):
        asyncio.run(judge.vote(evidence, 2))
    assert (seen, judge.asking, judge.deterministic) == ([1, 1], 0, False)


def test_the_engine_is_asked_at_most_once_a_second() -> None:
    engine = Engine()
    pace = pace_on(engine)
    for _ in range(50):
        allowed(pace)
    assert engine.asked == 1


@given(st.floats(0, 1e4), st.floats(0.01, 1.0))
def test_work_and_rest_keep_the_share(worked: float, share: float) -> None:
    rest = rest_s(worked, share)
    assert rest >= 0
    assert rest == LONGEST_REST_S or worked <= share * (worked + rest) * (1 + 1e-9) + 1e-9
