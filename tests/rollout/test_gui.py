"""plugins/environments/gui.py: what an agent sees of pages in a real Chromium, and may do."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.errors import ConfigError, StartError
from nextstate.hooks import Acted
from plugins.environments import browsers
from plugins.environments.browsers import Limits
from plugins.environments.gui import HOW, MOST_SHOWN, PageKind, Settings, action_of, create, shown
from plugins.environments.gui_tasks import PAGES, UNSEEN, pages, solution, task
from tests.rollout.machine import needs_chromium

PROCESSES = subprocess  # this file starts processes
ONE = Limits(browsers=1)
FLOORS = {"click-button": 0.9, "click-link": 0.8, "click-option": 0.8, "choose-list": 0.5}
"""What random actions solve at most: these pages have few elements, and some end at the first."""
MOST_CALLS = 6


def fields(page: str, split: str, number: int) -> dict[str, Any]:
    """What the environment reads of a task."""
    made = task(page, split, number)
    return {name: made[name] for name in ("page", "seed", "words")}


async def attempt(
    kind: PageKind, page: str, split: str, number: int, act: Callable[[str, str], str] | None = None
) -> float:
    """The outcome of an episode, by the task's solution or an agent: of (first, last shown)."""
    made, environment = fields(page, split, number), kind.make()
    kind.check_task(made)
    try:
        first = last = await environment.reset(made, 0)
        for reply in solution(page, first) if act is None else [None] * MOST_CALLS:
            acted = await environment.step(reply or act(first, last))  # type: ignore[misc]
            assert act is not None or acted.reward == 0.0, (first, reply, acted)
            last = acted.observation
            if acted.done:
                break
        return (await environment.score()).outcome
    finally:
        await environment.close()


def guesser(draw: random.Random) -> Callable[[str, str], str]:
    """Does something possible with any element; what it types is a word of the task."""

    def act(first: str, last: str) -> str:
        found = draw.choice(re.findall(r"^(\d+) (\w+)(.*)$", last, re.MULTILINE))
        if found[1] in ("input", "password"):
            words = re.findall(r"\w+", first.splitlines()[0])
            return f"type {found[0]} {draw.choice(words)}"
        if found[1] == "list":
            options = re.findall(r'"([^"]*)"', found[2])
            return f"select {found[0]} {draw.choice(options)}"
        return f"click {found[0]}"

    return act


async def outcomes(kind: PageKind, page: str, split: str, count: int, seed: int | None) -> float:
    """The share of tasks that the solution solves, or random actions if there is a seed."""
    draws = [None if seed is None else guesser(random.Random(seed + at)) for at in range(count)]
    tries = (attempt(kind, page, split, at, draw) for at, draw in enumerate(draws))
    return sum([outcome >= 1 for outcome in await asyncio.gather(*tries)]) / count


Test = Callable[[PageKind], Awaitable[None]]


def in_browser(test: Test, settings: Settings) -> None:
    async def run() -> None:
        kind = create(settings)
        try:
            await test(kind)
        finally:
            await kind.release()

    asyncio.run(run())


@pytest.fixture(scope="module")
def on_miniwob() -> Iterator[Callable[[Test], None]]:
    """Runs tests with the real pages in one browser, since its start takes seconds."""

    async def run(test: Test) -> None:
        await test(kind)

    with asyncio.Runner() as runner:
        kind = create(Settings(ONE))
        yield lambda test: runner.run(run(test))
        runner.run(kind.release())


@needs_chromium
def test_the_oracle_solves_each_page_and_random_actions_few(
    on_miniwob: Callable[[Test], None],
) -> None:
    async def test(kind: PageKind) -> None:
        for page in PAGES:
            assert await outcomes(kind, page, "eval", 1, None) == 1.0
        guessed = [await outcomes(kind, page, "eval", 2, 0) for page in PAGES]
        assert sum(guessed) / len(guessed) <= 0.4

    on_miniwob(test)


@needs_chromium
@pytest.mark.soak
@pytest.mark.parametrize("page", PAGES)
def test_the_oracle_solves_every_task_and_random_actions_reach_the_floor(page: str) -> None:
    async def test(kind: PageKind) -> None:
        for split in ("train", "eval"):
            if page in pages(split):
                assert await outcomes(kind, page, split, 12, None) == 1.0
        assert await outcomes(kind, page, "eval", 12, 0) <= FLOORS.get(page, 0.3)

    in_browser(test, Settings())


@needs_chromium
def test_a_task_is_the_same_each_time_and_its_words_are_those_of_its_split(
    on_miniwob: Callable[[Test], None],
) -> None:
    async def test(kind: PageKind) -> None:
        async def names(seed: int, words: str | None) -> str:
            page = kind.make()
            try:
                task = {"page": "choose-list", "seed": seed, "words": words}
                return (await page.reset(task, 0)).partition('"Submit"')[0]
            finally:
                await page.close()

        assert await names(1, "train") == await names(1, "train") != await names(2, "train")
        train, held_out = [
            set(re.findall(r'"([^"]*)"', "".join([await names(seed, split) for seed in range(4)])))
            for split in ("train", "eval")
        ]
        assert not train & held_out
        assert min(len(train), len(held_out)) > 10

    on_miniwob(test)


async def play(kind: PageKind, page: str, *replies: str) -> list[Acted]:
    environment = kind.make()
    try:
        await environment.reset({"page": page, "seed": 1}, 0)
        return [await environment.step(reply) for reply in replies]
    finally:
        await environment.close()


@needs_chromium
def test_a_mistake_is_told_and_costs(
    on_miniwob: Callable[[Test], None],
) -> None:
    async def test(kind: PageKind) -> None:
        acted = await play(
            kind,
            "login-user",
            *("I log in.", "click 9", "type 3 Ida", "select 1 Ida", "click 0", "type 1 Ida"),
        )
        begins = [one.observation.split("\n", 1)[0] for one in acted]
        assert begins == [
            f"error: this is no action. {HOW}",
            "error: there is no such element",
            "error: nothing can be typed into it",
            "error: it is no list",
            "error: there is no such element",
            'text "Username"',
        ]
        assert [one.reward for one in acted] == [-1.0] * 5 + [0.0]
        assert '1 input holds "Ida"' in acted[-1].observation
        (wrong,) = await play(kind, "choose-list", "select 1 Nobody")
        assert wrong.observation.startswith("error: it has no such option")

    on_miniwob(test)


@given(st.text() | st.from_regex(r"(click|type|select) [0-9]{1,4}.*"))
def test_any_reply_is_an_action_or_none(reply: str) -> None:
    found = action_of(reply)
    assert found is None or {*found} == {"verb", "number", "text"}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda part: st.lists(part) | st.dictionaries(st.text(), part),
)
_LINES = st.lists(
    st.dictionaries(st.sampled_from(["kind", "name", "value", "on", "options", "number"]), _JSON)
)


@given(st.fixed_dictionaries({"lines": _LINES | _JSON, "more": _JSON}))
def test_whatever_a_page_answers_the_observation_is_printable_and_bounded(answer: Any) -> None:
    text = shown(answer)
    assert len(text) <= MOST_SHOWN + 20
    assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"page": "../core/core"}, "page = '../core/core': expected a name such as click-button"),
        ({"page": None}, "page = None: expected a name"),
        ({"seed": -1}, "seed = -1: expected a whole number, 0 to 2147483647"),
        ({"seed": True}, "seed = True: expected a whole number"),
        ({"words": "all"}, "words = 'all': expected train or eval, or none"),
        ({"url": "x"}, "unknown field 'url': known are page, seed, words"),
    ],
)
def test_a_wrong_task_is_named(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        create(None).check_task({"page": UNSEEN, "seed": 1, **given})
    assert str(error.value).startswith(told)


@needs_chromium
def test_an_unknown_page_is_named() -> None:
    with pytest.raises(ConfigError, match=r"page = 'click-all': MiniWoB\+\+ has no such page"):
        create(None).check_task({"page": "click-all", "seed": 1})


def test_a_missing_program_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browsers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StartError) as error:
        asyncio.run(create(None).check_machine())
    assert str(error.value).startswith(
        "playwright and miniwob and chromium and bubblewrap not found: run `make gui`"
    )
