"""Chains of judges: who is asked, whose vote counts, and what a chain needs."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from judge.config import JudgeConfig, plugin_settings
from judge.verdict import verdict_of
from judge.votes import votes_on
from nextstate.app.settings import Settings
from nextstate.app.stages import evaluate_judge
from nextstate.errors import ConfigError, JudgeError, PluginError
from nextstate.hooks import Evidence, JudgeKind, JudgeSettings, load_judge, load_plugin
from nextstate.records import NextState, Source, Vote
from plugins.judges.chain import Chain

EVIDENCE = Evidence((("user", "Name a river."),), "Nile", (NextState("t", Source.USER, "k", 0.9),))


@dataclass
class Scripted:
    """Always gives the same answer or error, and counts the questions."""

    said: Vote | None
    name: str = "scripted"
    deterministic: bool = True
    seeds: list[int] = field(default_factory=list)
    closed: bool = False

    async def vote(self, evidence: Evidence, seed: int) -> Vote:
        self.seeds.append(seed)
        if self.said is None:
            raise JudgeError(f"{self.name} has nothing")
        return self.said

    async def close(self) -> None:
        self.closed = True


def asked(*judges: Scripted) -> Vote:
    return asyncio.run(Chain(judges).vote(EVIDENCE, 1))


UNSURE, SURE, OTHER = Vote(0, sure=False), Vote(1), Vote(-1)


def test_the_first_sure_vote_counts_and_nobody_after_it_is_asked() -> None:
    last = Scripted(OTHER)
    assert asked(Scripted(UNSURE), Scripted(SURE), last) == replace(SURE, judge="scripted")
    assert last.seeds == []


def test_a_vote_says_which_judge_of_the_chain_gave_it_and_so_does_the_verdict() -> None:
    chain = Chain([Scripted(UNSURE, "outcome"), Scripted(SURE, "rules"), Scripted(OTHER, "last")])
    votes = asyncio.run(votes_on(EVIDENCE, "turn", JudgeConfig(), chain))
    assert [vote.judge for vote in votes] == ["rules"]
    verdict = verdict_of("turn", chain.name, votes, EVIDENCE)
    assert verdict is not None
    assert verdict.judge == "rules"


def test_a_judge_that_becomes_deterministic_makes_its_chain_so() -> None:
    model = Scripted(SURE, "engine", deterministic=False)
    chain = Chain([Scripted(UNSURE), model])
    assert not chain.deterministic
    model.deterministic = True
    assert chain.deterministic


def test_without_a_sure_vote_the_last_vote_counts() -> None:
    assert asked(Scripted(Vote(1, sure=False)), Scripted(UNSURE)) == replace(
        UNSURE, judge="scripted"
    )


def test_after_a_failure_the_next_judge_is_asked_and_the_last_failure_is_raised() -> None:
    assert asked(Scripted(None), Scripted(SURE)) == replace(SURE, judge="scripted")
    with pytest.raises(JudgeError, match="b has nothing"):
        asked(Scripted(UNSURE, name="a"), Scripted(None, name="b"))


def test_a_chain_is_named_after_its_judges_and_deterministic_if_all_are() -> None:
    chain = Chain([Scripted(SURE, "rules"), Scripted(SURE, "engine", deterministic=False)])
    assert (chain.name, chain.deterministic) == ("rules,engine", False)
    assert Chain([Scripted(SURE), Scripted(SURE)]).deterministic


def test_a_deterministic_judge_is_asked_once_a_turn_and_others_for_every_vote() -> None:
    rules, engine = Scripted(UNSURE), Scripted(SURE, deterministic=False)
    chain = Chain([rules, engine])
    votes = asyncio.run(votes_on(EVIDENCE, "turn", JudgeConfig(votes=5), chain))
    assert votes == [replace(SURE, judge="scripted")] * 5
    assert (len(rules.seeds), len(set(engine.seeds))) == (1, 5)
    asyncio.run(votes_on(Evidence((), "Rhine", ()), "turn", JudgeConfig(votes=5), chain))
    assert len(rules.seeds) == 2


def test_closing_a_chain_closes_every_judge() -> None:
    judges = [Scripted(SURE), Scripted(SURE)]
    asyncio.run(Chain(judges).close())
    assert all(judge.closed for judge in judges)


def test_a_chain_is_loaded_by_the_names_of_its_judges() -> None:
    judge: JudgeKind = load_judge(JudgeConfig(kind="outcome,rules").kinds, JudgeSettings())
    assert (judge.name, judge.deterministic) == ("outcome,rules", True)
    assert load_judge(("rules",), JudgeSettings()).name == "rules"
    with pytest.raises(PluginError, match="no plugin 'ruels'"):
        load_judge(("ruels", "outcome"), JudgeSettings())
    with pytest.raises(PluginError, match="is not a judge"):
        load_plugin("judges", "chain", JudgeSettings())


@pytest.mark.parametrize("kind", ["", "rules,", "rules,,engine", "rules,rules"])
def test_a_chain_names_different_judges(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"\[judge\] kind"):
        JudgeConfig(kind=kind)


def test_engine_and_litellm_cannot_share_their_keys() -> None:
    with pytest.raises(ConfigError, match="name one of them"):
        JudgeConfig(kind="engine,rules,litellm")


def test_litellm_does_not_use_the_engine_as_its_provider() -> None:
    given = plugin_settings(JudgeConfig(kind="rules,litellm"), model="base", engines=["http://e"])
    assert (given.model, given.base_url) == ("", "")
    own = JudgeConfig(kind="litellm", model="openai/m", base_url="http://own/v1")
    given = plugin_settings(own, model="base", engines=["http://e"])
    assert (given.model, given.base_url) == ("openai/m", "http://own/v1")


def _settings(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "nextstate.toml"
    file.write_text(f"[store]\ndir = '{tmp_path / 'state'}'\n" + text)
    return Settings.read(file)


def test_litellm_anywhere_in_a_chain_needs_its_host_to_be_allowed(tmp_path: Path) -> None:
    chain = "[judge]\nkind = 'rules,litellm'\n"
    with pytest.raises(ConfigError, match=r"api\.openai\.com.*\[privacy\] allow_hosts"):
        _settings(tmp_path, chain)
    _settings(tmp_path, chain + "[privacy]\nallow_hosts = ['api.openai.com']\n")


def test_a_chain_without_a_model_is_evaluated_without_a_server(tmp_path: Path) -> None:
    case: dict[str, Any] = {
        "id": "a",
        "tail": [["user", "Name a river."]],
        "reply": "The Nile.",
        "next_states": [{"source": "user", "text": "Perfect, thanks!"}],
        "label": 1,
    }
    file = tmp_path / "cases.jsonl"
    file.write_text(json.dumps(case))
    settings = _settings(tmp_path, "[judge]\nkind = 'outcome,rules'\n")
    assert "1.00" in asyncio.run(evaluate_judge(settings, file, None)).splitlines()[1]
