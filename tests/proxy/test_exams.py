"""`POST /v1/exams`: a program on the API of episodes holds the exams of its lineage."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from learner.examining import Examining
from nextstate.exams import Exam
from nextstate.records import WHOLE_MODEL, PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.store.examiners import HELD_S
from proxy.episode_calls import UNRECORDED_EPISODE
from proxy.lineages import Access
from tests.proxy.environment import Environment, refusal
from tests.proxy.running_proxy import Running, add_version, both, serve
from tests.scripted_engine import MODEL, Script, ScriptedEngine, write_weights

DATABASES = True
DOCS = Path(__file__).parents[2] / "docs"
NONE = {"lineage": "main", "candidate": None, "parent": None, "planned": 0, "tasks": 0} | {
    "solved": 0, "gained": 0, "lost": 0,
}  # fmt: skip


async def played(
    environment: Environment, name: str, version: int, outcome: float, **more: Any
) -> None:
    pinned: dict[str, Any] = {"split": "eval", "seed": 0, "max_calls": 3, **more}
    await environment.open(name, version=version, **pinned)
    await environment.close(name, outcome=outcome)


def newest(store: Store) -> PolicyVersion:
    (found,) = store.versions.newest("main", 1)
    return found


def test_episodes_pinned_to_the_candidate_and_its_parent_are_its_exam(
    store: Store, tmp_path: Path
) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        environment, examining = Environment(p), Examining(store, "main", configured=False)
        assert await environment.ask("POST", "exams", {"tasks": 2}) == NONE
        candidate = add_version(store, tmp_path, 1)
        assert "`program unnamed` has not begun it" in (examining.waits(candidate) or "")
        exam = await environment.ask("POST", "exams", {"tasks": 2})
        assert exam == {**NONE, "candidate": 1, "parent": 0, "planned": 2}
        await played(environment, "a", 1, 0.0)
        await played(environment, "b", 0, 1.0)
        await played(environment, "c", 1, 1.0, seed=1)
        assert (await environment.ask("POST", "exams", {"tasks": 2}))["tasks"] == 1
        told = "it solves 0 and its parent 1 of 1 held-out tasks (2 are planned)"
        assert f"{told}; program unnamed plays it;" in (examining.waits(newest(store)) or "")
        await played(environment, "d", 0, 1.0, seed=1)
        exam = await environment.ask("POST", "exams", {"tasks": 2})
        assert (exam["solved"], exam["gained"], exam["lost"]) == (1, 0, 1)
        assert examining.waits(newest(store)) is None
        assert Exam.of(newest(store).metrics) == Exam(2, 2, 1, 0, 1)

    both(test, store, tmp_path)


def test_only_a_first_attempt_at_the_same_task_under_the_same_limits_counts(
    store: Store, tmp_path: Path
) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        add_version(store, tmp_path, 1)
        await played(environment, "parent", 0, 1.0)
        others = {"seed": 1}, {"max_calls": 4}, {"task": "another"}, {"split": "train"}
        for number, other in enumerate((*others, {"sampling": {"temperature": 1.0}})):
            await played(environment, f"other-{number}", 1, 1.0, **other)
        await environment.open("broken", split="eval", version=1, seed=0, max_calls=3)
        await environment.end("broken", 200, "failed")
        await environment.open("unpinned", split="eval", seed=0, max_calls=3)
        await environment.close("unpinned", outcome=1)
        assert (await environment.ask("POST", "exams", {"tasks": 1}))["tasks"] == 0
        await played(environment, "first", 1, 0.0)
        await played(environment, "second", 1, 1.0)
        exam = await environment.ask("POST", "exams", {"tasks": 1})
        assert (exam["tasks"], exam["solved"], exam["lost"]) == (1, 0, 1)

    both(test, store, tmp_path)


def test_one_program_holds_the_exams_until_it_has_said_nothing_for_a_minute(
    store: Store, tmp_path: Path
) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        for _again in range(2):
            await environment.ask("POST", "exams", {"tasks": 2, "holder": "words"})
        body = {"tasks": 2, "holder": "sums"}
        answer = await environment.ask("POST", "exams", body, 409)
        assert "program words holds the exams of lineage 'main'" in refusal(answer)
        assert answer["error"]["type"] == "ConflictError"
        now = store.database.now()
        store.database.now = lambda: now + HELD_S + 1
        assert store.examiners.holder("main") is None
        assert await environment.ask("POST", "exams", body) == NONE
        assert store.examiners.holder("main") == "program sums"

    both(test, store, tmp_path)


def test_what_is_no_request_for_an_exam_is_refused_with_what_to_change(
    store: Store, tmp_path: Path
) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        await environment.open("e")
        for body, told in (
            ({}, "tasks is missing: expected 1 to 1000"),
            ({"tasks": 0}, "tasks = 0: expected 1 to 1000"),
        ):
            assert refusal(await environment.ask("POST", "exams", body, 400)).startswith(told)
        deep = b"[" * 1000 + b"]" * 1000
        sampling = b'{"environment": "e", "task": "t", "sampling": {"top_p": %b}}' % deep
        for path, bodies in {
            "exams": (deep, b'{"tasks": %b}' % deep),
            "episodes": (deep, sampling),
            "groups": (deep, b'{"group_size": %b}' % deep),
            "episodes/e/close": (deep, b'{"status": %b}' % deep),
            "episodes/e/rewards": (deep, b'[{"kind": %b}]' % deep),
        }.items():
            for deep_one in bodies:
                answer = await environment.ask("POST", path, deep_one, 400)
                assert refusal(answer) == "The body is nested too deep."

    both(test, store, tmp_path)


def test_no_exam_is_planned_where_nothing_is_recorded(store: Store, tmp_path: Path) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        add_version(store, tmp_path, 1)
        answer = await Environment(p).ask("POST", "exams", {"tasks": 2}, 409)
        assert refusal(answer) == UNRECORDED_EPISODE
        assert Exam.of(newest(store).metrics) == Exam()
        assert store.examiners.holder("main") is None

    both(test, store, tmp_path, record=False)


def test_a_whole_model_takes_no_exam(store: Store, tmp_path: Path) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        sha256 = write_weights(tmp_path / "v1")
        made = PolicyVersion("main", 1, 0, str(tmp_path / "v1"), sha256, 16, VersionState.CANDIDATE)
        store.versions.add(replace(made, metrics={WHOLE_MODEL: 1.0}), None)
        assert await Environment(p).ask("POST", "exams", {"tasks": 2}) == NONE
        assert Exam.of(newest(store).metrics) == Exam()

    both(test, store, tmp_path)


def test_nobody_holds_the_exams_of_a_lineage_that_the_key_does_not_see(
    store: Store, tmp_path: Path
) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        own = Environment(p, "b" * 40)
        assert (await own.ask("POST", "exams", {"tasks": 2}))["lineage"] == "other"
        answer = await own.ask("POST", "exams", {"tasks": 2, "lineage": "main"}, 400)
        assert "lineage = 'main': expected other" in refusal(answer)
        assert store.examiners.holder("main") is None

    access = {"other": Access(None, "b" * 40)}
    both(test, store, tmp_path, key="a" * 40, access=access)


def test_the_program_of_the_document_plays_an_exam_and_plays_nothing_twice(
    store: Store, tmp_path: Path
) -> None:
    first, second = (
        re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.S)[0]
        for name in ("environments.md", "exams.md")
    )

    async def test(engine: ScriptedEngine, p: Running) -> None:
        here = (first + second).replace("http://127.0.0.1:8080", p.url).replace("MODEL", MODEL)
        engine.queue += [Script(("a", ".txt"))] * 4
        held: dict[str, Any] = {}
        await asyncio.to_thread(exec, here, held)
        assert store.examiners.holder("main") == "program words"
        await serve(store, p, tmp_path, 1)
        add_version(store, tmp_path, 2)
        engine.queue += [Script(("a", ".txt")), Script(("b", ".txt"))] * 2
        await asyncio.to_thread(held["examine"])
        assert Exam.of(newest(store).metrics) == Exam(2, 2, 2, 2, 0)
        count = len(engine.requests)
        await asyncio.to_thread(held["examine"])
        assert len(engine.requests) == count

    both(test, store, tmp_path)
