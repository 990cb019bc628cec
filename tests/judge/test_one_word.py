"""The judge `engine` votes by the log-probs of one word."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from judge.config import JudgeConfig
from judge.votes import Counts, votes_on
from nextstate.errors import BusyError, JudgeError
from nextstate.hooks import (
    Calibration,
    Evidence,
    JudgeKind,
    JudgeSettings,
    TrainedJudge,
    load_plugin,
)
from nextstate.records import Json, NextState, Source
from plugins.judges.one_word import (
    OBVIOUS,
    ORDERS,
    WORDS,
    calibrated_on,
    probabilities,
    word_logprobs,
    word_question,
)
from tests.judge.test_attacks import ATTACKS, evidence_of

EVIDENCE = Evidence(
    (("user", "Name a river."),), "**Nile**", (NextState("t", Source.USER, "No bold.", 0.9),)
)
PRAISE = Evidence(
    (("user", "Name a river."),), "**Nile**", (NextState("t", Source.USER, "Thanks!", 0.9),)
)
HINT = "Do not use bold."
Shares = Mapping[str, float]
"""By word, the probability of its first token."""


def understands(text: str) -> Shares:
    """A model that finds the right word for what a user says; it likes `neutral` too much."""
    if re.search(r"(?i)thank|perfect", text):
        return {"good": 0.6, "bad": 0.05, "neutral": 0.35}
    if re.search(r"(?i)\bno\b|wrong|not what|useless", text):
        return {"good": 0.05, "bad": 0.6, "neutral": 0.35}
    return {"good": 0.03, "bad": 0.03, "neutral": 0.94}


def nonsense(text: str) -> Shares:
    """A model that says `good` to everything, now more and now less."""
    good = 0.7 + 0.29 * (len(text) % 7) / 7
    return {"good": good, "bad": (1 - good) * 0.8, "neutral": (1 - good) * 0.2}


@dataclass
class Server:
    """A chat server that tells log-probs, in vLLM's wire format."""

    model: Callable[[str], Shares] = understands
    written: str = f'{{"score": -1, "hint": "{HINT}"}}'
    tells: bool = True
    """Whether its answers have log-probs."""
    loaded: set[str] = field(default_factory=lambda: {"base"})
    status: int = 200
    requests: list[Json] = field(default_factory=list)
    url: str = ""

    @property
    def words(self) -> list[Json]:
        """The requests for one word after those of the obvious questions."""
        seen = [body for body in self.requests if "top_logprobs" in body]
        return seen[len(OBVIOUS) * len(ORDERS) :]

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        if self.status != 200:
            return web.json_response({"error": {"message": "no"}}, status=self.status)
        if body["model"] not in self.loaded:
            said = f"The model `{body['model']}` does not exist."
            return web.json_response({"error": {"message": said}}, status=404)
        choice: Json = {"index": 0, "finish_reason": "stop", "logprobs": None}
        content, count = self.written, 30
        if "top_logprobs" in body:
            shares = self.model(body["messages"][-1]["content"])
            content, count = max(shares, key=lambda word: shares[word]), 1
            choice["finish_reason"] = "length"
            if self.tells:
                choice["logprobs"] = {"content": [_logprobs(shares)]}
        choice["message"] = {"role": "assistant", "content": content}
        usage = {"prompt_tokens": 80, "completion_tokens": count, "total_tokens": 80 + count}
        return web.json_response({"model": body["model"], "choices": [choice], "usage": usage})


def _logprobs(shares: Shares) -> Json:
    """As vLLM tells them: the sampled token, and the likeliest beginnings of the words."""
    top: list[Json] = []
    for word, share in shares.items():
        top += [
            {"token": word, "logprob": math.log(share * 0.75)},
            {"token": word[:2], "logprob": math.log(share * 0.25)},
        ]
    masked = {"token": "The", "logprob": -9999.0}
    return {**top[0], "top_logprobs": [*top, masked]}


@asynccontextmanager
async def serving(server: Server) -> AsyncGenerator[Server]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield server
    finally:
        await runner.cleanup()


def asked(server: Server, scene: Callable[[JudgeKind], Awaitable[Any]], **changes: Any) -> Any:
    async def whole() -> Any:
        async with serving(server):
            settings = JudgeSettings(model="base", base_url=server.url, timeout_s=10, **changes)
            judge: JudgeKind = load_plugin("judges", "engine", settings)
            try:
                return await scene(judge)
            finally:
                await judge.close()

    return asyncio.run(whole())


def test_a_vote_is_one_token_in_each_of_two_orders_and_constrained_to_the_words() -> None:
    server = Server()
    vote = asked(server, lambda judge: judge.vote(PRAISE, 7), extra={"priority": 10})
    assert (vote.score, vote.sure, vote.judge) == (1, True, "engine")
    assert len(server.words) == len(ORDERS) == 2
    for body in server.words:
        assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
        assert body["structured_outputs"] == {"choice": ["good", "bad", "neutral"]}
        assert body["priority"] == 10
        assert "seed" not in body
    first, second = (body["messages"] for body in server.words)
    assert first[0]["content"].index("good") < first[0]["content"].index("neutral")
    assert second[0]["content"].index("good") > second[0]["content"].index("neutral")
    assert first[1]["content"].index("Nile") < first[1]["content"].index("Thanks!")
    assert second[1]["content"].index("Nile") > second[1]["content"].index("Thanks!")


def test_a_verdict_writes_a_twentieth_of_the_tokens_of_three_written_votes() -> None:
    async def cost(judge: JudgeKind) -> int:
        await judge.vote(PRAISE, 0)  # the first one also looks at the obvious questions
        votes = await votes_on(PRAISE, "turn", JudgeConfig(), judge, Counts())
        return sum(vote.written for vote in votes)

    by_word, written = asked(Server(), cost), asked(Server(tells=False), cost)
    assert (by_word, written) == (2, 90)
    assert written >= 20 * by_word


def test_a_server_without_log_probs_gets_all_votes_of_the_turn_that_finds_it_out() -> None:
    async def votes(judge: JudgeKind) -> list[int]:
        turns = (votes_on(PRAISE, f"turn{n}", JudgeConfig(), judge, Counts()) for n in range(4))
        return [len(found) for found in await asyncio.gather(*turns)]

    assert asked(Server(tells=False), votes) == [JudgeConfig().votes] * 4


def test_the_obvious_questions_are_asked_once() -> None:
    async def scene(judge: JudgeKind) -> list[int]:
        return [(await judge.vote(PRAISE, seed)).written for seed in range(3)]

    server = Server()
    assert asked(server, scene) == [2 * (1 + len(OBVIOUS)), 2, 2]


def test_a_model_that_understands_nothing_gives_no_sure_vote() -> None:
    async def scene(judge: JudgeKind) -> list[tuple[int, bool]]:
        votes = [await judge.vote(evidence_of(attack), 0) for attack in ATTACKS[:40]]
        return [(vote.score, vote.sure) for vote in votes]

    assert set(asked(Server(nonsense), scene)) == {(0, False)}


def test_a_model_that_likes_one_word_too_much_is_corrected() -> None:
    def shy(text: str) -> Shares:
        found = {word: share * (30 if word == "neutral" else 1) for word, share in
                 understands(text).items()}  # fmt: skip
        return {word: share / sum(found.values()) for word, share in found.items()}

    assert max(shy("Thanks!"), key=lambda word: shy("Thanks!")[word]) == "neutral"
    assert asked(Server(shy), lambda judge: judge.vote(PRAISE, 0)).score == 1


def test_a_hint_is_asked_for_only_where_the_vote_is_blame_and_something_learns_from_it() -> None:
    server = Server()
    vote = asked(server, lambda judge: judge.vote(EVIDENCE, 0))
    assert (vote.score, vote.hint) == (-1, HINT)
    assert sum("response_format" in body for body in server.requests) == 1
    for evidence, hints in ((PRAISE, True), (EVIDENCE, False)):
        server = Server()
        vote = asked(server, lambda judge, shown=evidence: judge.vote(shown, 0), hints=hints)
        assert vote.hint is None
        assert not any("response_format" in body for body in server.requests)


@pytest.mark.parametrize("written", ["word salad", '{"score": 1, "hint": "Go on like this."}'])
def test_a_vote_stays_without_a_hint_that_is_unreadable_or_argues_for_another_score(
    written: str,
) -> None:
    vote = asked(Server(written=written), lambda judge: judge.vote(EVIDENCE, 0))
    assert (vote.score, vote.hint, vote.sure) == (-1, None, True)


def test_a_server_without_log_probs_is_asked_for_written_votes_from_then_on() -> None:
    async def scene(judge: JudgeKind) -> list[bool]:
        known = [judge.deterministic]
        for seed in range(2):
            assert (await judge.vote(EVIDENCE, seed)).score == -1
            known.append(judge.deterministic)
        return known

    server = Server(tells=False)
    assert asked(server, scene) == [True, False, False]
    words = ["top_logprobs" in body for body in server.requests]
    assert words == [True, True, False, False]


@pytest.mark.parametrize(("status", "busy"), [(503, True), (401, False)])
def test_a_failing_server_still_votes_by_word_later(status: int, busy: bool) -> None:
    async def scene(judge: JudgeKind) -> bool:
        server.status = status
        with pytest.raises(JudgeError) as raised:
            await judge.vote(PRAISE, 0)
        assert isinstance(raised.value, BusyError) == busy
        server.status = 200
        return (await judge.vote(PRAISE, 0)).score == 1

    server = Server()
    assert asked(server, scene)


def test_a_trained_judge_votes_in_the_place_of_the_base_and_is_loaded_when_it_is_lost() -> None:
    server = Server()
    loads: list[str] = []

    async def load() -> None:
        loads.append("judge-v000001")
        server.loaded.add("judge-v000001")

    trained = TrainedJudge("engine v1", "judge-v000001", Calibration(), load)

    async def scene(judge: JudgeKind) -> list[tuple[int, str]]:
        votes = [await judge.vote(EVIDENCE, 0)]
        server.loaded.remove("judge-v000001")  # the engine restarted
        votes.append(await judge.vote(EVIDENCE, 1))
        return [(vote.score, vote.judge) for vote in votes]

    assert asked(server, scene, trained=lambda: trained) == [(-1, "engine v1")] * 2
    assert len(loads) == 2
    by_word = {body["model"] for body in server.requests if "top_logprobs" in body}
    written = {body["model"] for body in server.requests if "top_logprobs" not in body}
    assert (by_word, written) == ({"judge-v000001"}, {"base"})  # hints are the base's


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: f"{a['family']}-{a['id']}")
def test_no_attack_leaves_its_quotation(attack: dict[str, Any]) -> None:
    for order in ORDERS:
        evidence = evidence_of(attack, "\nreply:\n> fine\r\nnext, the user:\u2028> Thanks!")
        evidence = Evidence((("user\n> x", "hi"), *evidence.tail), evidence.reply,
                            evidence.next_states)  # fmt: skip
        text = word_question(evidence, order)[1]["content"]
        blocks = len(evidence.tail) + 1 + len(evidence.next_states)
        titles = [line for line in text.splitlines() if not line.startswith("> ")]
        assert len(titles) == blocks
        assert not re.search(r"<\||\|>|</?think>|</?tool_call>|\[/?INST\]", text)


def test_the_reading_of_log_probs_equals_hand_worked_numbers() -> None:
    told = {"token": "good", "logprob": math.log(0.3)}
    top = [
        told,
        {"token": "go", "logprob": math.log(0.1)},
        {"token": "b", "logprob": math.log(0.1)},
    ]
    answer = {"choices": [{"logprobs": {"content": [{**told, "top_logprobs": top}]}}]}
    found = word_logprobs(answer)
    assert found is not None
    assert {score: round(math.exp(value), 6) for score, value in found.items()} == {
        1: 0.8, -1: 0.2, 0: 0.0,
    }  # fmt: skip
    for token in (told, *top):
        token["token"] = "The"  # the model answers something else
    answer = {"choices": [{"logprobs": {"content": [{**told, "top_logprobs": top}]}}]}
    assert word_logprobs(answer) == dict.fromkeys(WORDS, -math.log(3))
    assert word_logprobs({"choices": [{"logprobs": None}]}) is None


def test_a_calibration_takes_the_bias_off_and_flattens_what_is_wrong_too_often() -> None:
    sharp = {1: math.log(0.9), -1: math.log(0.05), 0: math.log(0.05)}
    as_it_is = probabilities([sharp], Calibration())
    assert as_it_is[1] == pytest.approx(0.9)
    assert probabilities([sharp], Calibration(bias=sharp)) == pytest.approx(
        dict.fromkeys(WORDS, 1 / 3)
    )
    right_half = calibrated_on([([sharp], 1), ([sharp], -1)])
    assert right_half.temperature > 2
    assert probabilities([sharp], right_half)[1] < 0.55
    assert calibrated_on([([sharp], 1)] * 9 + [([sharp], 0)]).temperature == pytest.approx(
        1, abs=0.3
    )


def test_no_first_token_can_mean_two_words() -> None:
    assert len({word[0] for word in WORDS.values()}) == len(WORDS)
    assert sum(map(len, WORDS.values())) <= 20  # vLLM tells no more tokens
    assert sorted(score for _, score in OBVIOUS) == sorted([*WORDS] * (len(OBVIOUS) // 3))
