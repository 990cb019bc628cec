"""`nextstate judge train` on the demo's policy: what it learns from, and what it keeps."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from demo.course import POLICY
from judge.evaluation import Case, read_cases
from nextstate.agreement import agreement
from nextstate.app.cli import main
from nextstate.app.judge_training import chosen, own_cases
from nextstate.app.settings import Settings
from nextstate.app.trained_judge import (
    BASE_KAPPA,
    HELD_OUT,
    KAPPA,
    KAPPA_HIGH,
    KAPPA_LOW,
    OWN,
    TrainedJudges,
    judge_path,
    judge_versions,
)
from nextstate.engine.client import EngineClient
from nextstate.errors import ConfigError, JudgeError
from nextstate.hooks import Evidence, TrainedJudge
from nextstate.records import Feedback, NextState, Source
from nextstate.store import Store
from nextstate.store.ledger import Ledger
from tests.learner.test_tiny_model import save_tiny_model  # noqa: F401  (marks the file: it trains)
from tests.store.test_records import add, turn

SAID = {1: "yes", -1: "no", 0: "so"}
"""What users of the toy cases say: one token tells all."""


def toy_cases(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"c{number}",
            "tail": [["user", f"{number}?"]],
            "reply": "4",
            "next_states": [{"source": "user", "text": SAID[label]}],
            "label": label,
        }
        for number in range(count)
        if (label := number % 3 - 1) is not None
    ]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "nextstate.toml"
    file.write_text(
        f'[store]\ndir = "{tmp_path}/state"\n[engine]\nmodel = "{POLICY}"\n'
        "[learner]\nthreads = 1\ngradient_checkpointing = false\n"
    )
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, toy_cases(120))))
    return file


def train(config: Path, *more: str) -> int:
    cases = str(config.parent / "cases.jsonl")
    return main(["judge", "train", cases, "--config", str(config), *more])


def test_a_judge_learns_what_the_base_cannot_and_is_kept_as_a_version(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tell, votes = Ledger.tell_judge, list[bool]()

    def tells(ledger: Ledger, number: int, *rest: Any) -> None:
        votes.append(judge_path(Settings.read(config), number).exists())
        tell(ledger, number, *rest)

    monkeypatch.setattr(Ledger, "tell_judge", tells)
    spoken = [{**case, "language": "en"} for case in toy_cases(120)]
    wrong = [{**case, "language": "de", "label": -case["label"]} for case in toy_cases(120)]
    (config.parent / "cases.jsonl").write_text("\n".join(map(json.dumps, wrong + spoken)))
    assert train(config, "--examples", "100", "--epochs", "4", "--language", "en") == 0
    settings = Settings.read(config)
    (first,) = judge_versions(settings)
    assert (first.number, first.parent, first.path) == (1, None, str(judge_path(settings, 1)))
    assert first.metrics[KAPPA] > 0.8 > first.metrics[BASE_KAPPA]
    assert (first.metrics[HELD_OUT], first.metrics[OWN], first.samples) == (17, 0, 80)
    said = capsys.readouterr().out
    assert said.startswith(f"judge v1 is kept in {first.path}: κ {first.metrics[KAPPA]:.2f} (")

    assert main(["status", "--config", str(config)]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if "trained_judge" in line]
    assert len(shown) == 1
    assert "engine v1 votes, trained on 80 labelled next states, 0 of them yours: κ " in shown[0]

    again = "--examples", "100", "--epochs", "1", "--language", "en"
    assert train(config, *again) == 0  # goes on from 1
    assert [v.parent for v in judge_versions(settings)] == [None, 1]
    assert main(["verify", "--config", str(config)]) == 0  # the ledger tells of both
    assert ", v1 " in capsys.readouterr().out
    assert votes == [False, False]  # a judge that a kill leaves before that has no vote
    folders = [file.name for file in judge_path(settings, 1).parent.iterdir() if file.is_dir()]
    assert sorted(folders) == ["v000001", "v000002"]

    other = config.read_text().replace(str(POLICY), str(config.parent))
    (config.parent / "other.toml").write_text(other)
    assert judge_versions(Settings.read(config.parent / "other.toml")) == []  # another base model


def test_what_does_not_agree_better_than_the_base_is_not_kept(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{**case, "label": place * 7 % 3 - 1, "next_states": [{"source": "user", "text": "k"}]}
             for place, case in enumerate(toy_cases(60))]  # fmt: skip
    (config.parent / "cases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert train(config, "--examples", "30") == 2
    assert "is not kept: κ" in capsys.readouterr().err
    assert judge_versions(Settings.read(config)) == []
    assert not judge_path(Settings.read(config), 1).exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--examples", "19"), "--examples 19 --epochs 5: expected at least 20"),
        (("--epochs", "0"), "--epochs 0: expected"),
        (("--split", "dev"), "holds no case of split 'dev'"),
        (("--language", "eo"), "--language 'eo': no labelled next state has it; they have none"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_the_model_is_read(
    config: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert train(config, *more) == 2
    assert said in capsys.readouterr().err


def test_a_second_training_at_the_same_time_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nextstate.process_lock import ProcessLock

    folder = config.parent / "state" / "judge"
    folder.mkdir(parents=True)
    with ProcessLock(folder / "lock", "", ""):
        assert train(config) == 2
    assert "a judge is being trained by process" in capsys.readouterr().err


def cases_of(count: int, prefix: str = "c") -> list[Case]:
    state = NextState("", Source.USER, "ok", 0.9)
    return [
        Case(f"{prefix}{n}", Evidence((("user", f"{prefix}{n}?"),), "r", (state,)), 1, {})
        for n in range(count)
    ]


def test_no_conversation_is_ever_trained_on_that_is_held_out_in_any_training() -> None:
    every = cases_of(300)
    many = [chosen([], every, examples, seed) for seed in range(3) for examples in (40, 100, 1000)]
    trained = {case.id for one in many for case in one.train}
    held_out = {case.id for one in many for case in one.held_out}
    assert not trained & held_out
    assert many[0].held_out == many[3].held_out  # the same ones check every version
    assert [len(one.train) for one in many[:2]] == [32, 80]
    assert len(held_out) > 40
    assert many[0].train != many[3].train


def test_the_turns_of_a_session_stay_together() -> None:
    """A later turn's context holds an earlier reply and what followed it."""
    said = [("user" if n % 2 == 0 else "assistant", str(n)) for n in range(7)]
    state = NextState("", Source.USER, "ok", 0.9)
    own = [
        Case(f"{s}/{n}", Evidence(tuple(said[n:][: n + 1]), "r", (state,)), 1, {"session": str(s)})
        for s in range(60)
        for n in range(3)
    ]
    talks = [
        Case(f"t{s}/{n}", Evidence((("user", f"t{s}"), *said[:n]), "r", (state,)), 1, {})
        for s in range(60)
        for n in range(3)
    ]
    found = chosen(own, talks, 1000, 0)
    trained, held = ({c.id.split("/")[0] for c in part} for part in (found.train, found.held_out))
    assert not trained & held


def test_three_cases_are_too_few_whatever_side_they_are_on() -> None:
    many = chosen([], cases_of(99), 99, 0)
    with pytest.raises(ConfigError, match=r"3 labelled next states are too few .* at least 20"):
        chosen([], [many.held_out[0], *many.train[:2]], 20, 0)


def test_the_interval_of_kappa_tells_noise_from_worth() -> None:
    """0.13 on 60 cases, and one right of one, are over the base's 0 by chance."""
    noise = agreement([(1, 1)] * 10 + [(0, 1)] * 20 + [(-1, -1)] * 15 + [(0, -1)] * 15)
    assert noise.kappa > 0 > agreement([(1, 1), (0, -1), (-1, 0)]).kappa_interval[0]
    assert agreement([(1, 1)]).kappa_interval == (-1.0, 1.0)
    clear = agreement([(1, 1), (0, 0), (-1, -1)] * 10)
    assert clear.kappa_interval[0] > 0.8


def test_the_persons_own_come_first() -> None:
    own = cases_of(30, "turn_")
    found = chosen(own, cases_of(300), 40, 0)
    assert [case.id in found.own for case in found.train] == sorted(
        (case.id in found.own for case in found.train), reverse=True
    )
    assert len({case.id for case in (*found.train, *found.held_out)} & found.own) == 30


def test_labels_of_one_sign_do_not_crowd_out_the_others() -> None:
    """Who rates only what is wrong would train a judge, and check it, on one answer."""
    own = [replace(case, label=-1) for case in cases_of(400, "turn_")]
    ours = [replace(case, label=n % 3 - 1) for n, case in enumerate(cases_of(600))]
    found = chosen(own, ours, 240, 0)
    for part in (found.train, found.held_out):
        shares = Counter(case.label for case in part)
        assert set(shares.values()) == {len(part) // 3}
        assert all(case.id in found.own for case in part if case.label == -1)
    few = chosen(own[:9], [case for case in ours if case.label != 0], 240, 0)
    assert len(few.train) == 192  # no label is missed that there is not enough of
    assert {case.id for case in own[:9]} <= {case.id for case in (*few.train, *few.held_out)}


def test_a_persons_feedback_becomes_labelled_next_states(config: Path) -> None:
    settings = Settings.read(config)
    store = Store(settings.store)
    add(store, turn(0), next_state=None)
    add(store, turn(1), turn(2), next_state="No, shorter.")
    for number, score in enumerate((1, -1)):
        store.judging.give_feedback(Feedback(f"turn_{number}", score))
    store.close()
    found = own_cases(settings, 10)  # nothing followed turn 0, and nobody rated turn 2
    assert [(case.id, case.label) for case in found] == [("turn_1", -1)]
    assert [s.text for s in found[0].evidence.next_states] == ["No, shorter."]
    assert own_cases(settings, 0) == []


def test_our_own_labelled_cases_have_a_split_for_training() -> None:
    from judge.evaluation import LABELLED

    assert len(read_cases(LABELLED, "dev")) > 1000


@pytest.mark.parametrize("missing", [(KAPPA_LOW, KAPPA_HIGH), (OWN, BASE_KAPPA), (KAPPA,)])
def test_a_version_that_knows_less_of_itself_is_shown_all_the_same(
    config: Path, capsys: pytest.CaptureFixture[str], missing: tuple[str, ...]
) -> None:
    known = {KAPPA: 0.5, KAPPA_LOW: 0.4, KAPPA_HIGH: 0.6, BASE_KAPPA: 0.0, HELD_OUT: 40.0, OWN: 2.0}
    more = {name: value for name, value in known.items() if name not in missing}
    write_version(Settings.read(config), 1, more=more)
    assert main(["status", "--config", str(config)]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if "trained_judge" in line]
    assert "engine v1 votes, trained on 9 labelled next states" in shown[0]
    assert ("0.50" in shown[0]) is (KAPPA not in missing)
    assert ("0.40 to 0.60" in shown[0]) is (KAPPA_LOW not in missing and KAPPA not in missing)


def write_version(
    settings: Settings,
    number: int,
    model: str = str(POLICY),
    more: Mapping[str, float] | None = None,
) -> None:
    folder = judge_path(settings, number)
    folder.mkdir(parents=True)
    metrics = {"judge/temperature": 2.0, "judge/examples": 9.0, **(more or {})}
    card = {"number": number, "parent": None, "sha256": f"{number:064x}", "metrics": metrics}
    (folder / "card.json").write_text(json.dumps(card))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": model}))


def test_the_newest_readable_version_for_the_model_votes_and_a_refused_one_no_more(
    config: Path,
) -> None:
    settings = Settings.read(config)

    async def scene() -> list[str | None]:
        async with EngineClient("http://127.0.0.1:1", "m") as engine:
            judges = TrainedJudges(settings, [engine], look_s=0.0)
            names = [_name(judges())]
            write_version(settings, 1)
            write_version(settings, 2)
            write_version(settings, 3, "another-model")
            write_version(settings, 4)
            (judge_path(settings, 4) / "card.json").write_text("{")
            found = judges()
            names.append(_name(found))
            assert found is not None
            assert found.calibration.temperature == 2.0
            assert found.model.startswith("judge-v000002-")
            with pytest.raises(JudgeError):  # BusyError: no engine is there
                await found.load()
            names.append(_name(judges()))
            shutil.rmtree(judge_path(settings, 2))  # a person goes back
            return [*names, _name(judges())]

    assert asyncio.run(scene()) == [None, "engine v2", "engine v2", "engine v1"]


def _name(judge: TrainedJudge | None) -> str | None:
    return None if judge is None else judge.name
