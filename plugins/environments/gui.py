"""The environment `gui`: the agent uses a page of MiniWoB++ in a real Chromium.

A task has these fields beside its id:

    page    the name of a page, such as click-button
    seed    a whole number from which the page makes its task
    words   train or eval: the page draws names and words from one part of its lists (optional)

The agent sees the task and a numbered list of what is visible. It answers with one action in the
last line of its reply: `click N`, `type N TEXT` or `select N OPTION`. The page itself says when the
task is over and whether it was solved. Its texts are untrusted and bounded.
"""

from __future__ import annotations

import importlib.util
import re
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from nextstate.errors import ConfigError, RolloutError, StartError
from nextstate.hooks import Acted, Scored
from nextstate.records import Json
from plugins.environments.browsers import Browsers, Limits, Tab, check_programs
from plugins.environments.gui_tasks import WORDS, numbered

MOST_SEED = 2**31 - 1
_MOST = {"lines": 60, "chars": 100, "options": 20, "nodes": 10_000, "query": 1000}
"""What a page may show: lines, characters of each text, options of a list, nodes that are looked
at, and characters of its task."""
MOST_SHOWN = 6000
"""Characters of an observation."""
_MOST_REPLY_CHARS = 4096
_PAGE = re.compile(r"[a-z0-9][a-z0-9-]{0,60}")
_ACTION = re.compile(r"(click|type|select) ([0-9]{1,3})(?: (.*))?")
_SCRIPT = Path(__file__).with_name("gui_page.js")
HOW = "Answer with one action: click N, type N TEXT or select N OPTION."


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the pages lie, and what the browsers may use."""

    limits: Limits = field(default_factory=Limits)
    pages: Path | None = None
    """A folder with the folders miniwob, core and common. None: the one of the package miniwob."""


class Page:
    """One episode in a tab."""

    def __init__(self, browsers: Browsers, script: str) -> None:
        self._browsers = browsers
        self._script = script
        self._held = AsyncExitStack()
        self._tab: Tab | None = None
        self._reward: float | None = None
        """What the page gave at the end; None: the task is not over."""

    async def reset(self, task: Json, seed: int) -> str:
        self._tab = await self._held.enter_async_context(self._browsers.tab())
        await self._tab.open(f"miniwob/{task['page']}.html")
        start = {"seed": str(task["seed"]), "words": task.get("words")}
        found = await self._ask({"start": start})
        return f"{_clean(found.get('query'), _MOST['query'])}\n{shown(found)}\n{HOW}"

    async def step(self, action: str) -> Acted:
        act = action_of(action)
        if act is None:
            return Acted(f"error: this is no action. {HOW}", -1.0, False)
        found = await self._ask({"act": act})
        if found.get("error"):
            told = f"error: {_clean(found['error'])}\n{shown(found)}"
            return Acted(told, -1.0, False)
        if self._reward is not None:
            return Acted("The task is over.", 0.0, True)
        return Acted(shown(found), 0.0, False)

    async def score(self) -> Scored:
        if self._tab is None or not self._tab.works:
            raise RolloutError("the episode was cut while the browser was at work")
        reward = self._reward or 0.0
        return Scored(min(1.0, max(0.0, reward)), "right" if reward >= 1 else "wrong")

    async def picture(self) -> bytes | None:
        if self._tab is None or self._reward is not None:
            return None  # a page that is over hides what was on it
        return await self._tab.picture()

    async def close(self) -> None:
        await self._held.aclose()

    async def _ask(self, given: Json) -> Json:
        assert self._tab is not None
        found = await self._tab.ask(self._script, {**given, "most": _MOST})
        if not isinstance(found, dict):
            raise RolloutError(f"the page answered {found!r:.80}")
        answer = cast(Json, found)
        if answer.get("done") is True:
            reward = answer.get("reward")
            self._reward = float(reward) if isinstance(reward, int | float) else 0.0
        return answer


class PageKind:
    """Makes episodes, which share the browsers."""

    def __init__(self, settings: Settings | None = None) -> None:
        settings = settings or Settings()
        self._limits = settings.limits
        self._pages = settings.pages or _package()
        self._browsers: Browsers | None = None

    def check_task(self, task: Json) -> None:
        for name in task.keys() - {"page", "seed", "words"}:
            raise ConfigError(f"unknown field {name!r:.80}: known are page, seed, words")
        page, seed, words = task.get("page"), task.get("seed"), task.get("words")
        if not isinstance(page, str) or not _PAGE.fullmatch(page):
            raise ConfigError(f"page = {page!r:.80}: expected a name such as click-button")
        if self._pages is not None and not (self._pages / "miniwob" / f"{page}.html").is_file():
            raise ConfigError(f"page = {page!r}: MiniWoB++ has no such page")
        if type(seed) is not int or not 0 <= seed <= MOST_SEED:
            raise ConfigError(f"seed = {seed!r:.80}: expected a whole number, 0 to {MOST_SEED}")
        if words not in (None, *WORDS):
            raise ConfigError(f"words = {words!r:.80}: expected {' or '.join(WORDS)}, or none")

    def generate(self, split: str, number: int) -> Json:
        """Task number N of a split, with its `id`."""
        return numbered(split, number)

    async def check_machine(self) -> None:
        """Raises StartError unless a browser shows a page here."""
        check_programs()
        page = self.make()
        try:
            await page.reset({"page": "click-button", "seed": 0}, 0)
        except RolloutError as error:
            raise StartError(
                f"{error}; does `bwrap --unshare-all --ro-bind / / true` work on this machine?"
            ) from error
        finally:
            await page.close()
            await self.release()

    async def release(self) -> None:
        if self._browsers is not None:
            await self._browsers.close()

    def make(self) -> Page:
        if self._browsers is None:
            self._browsers = Browsers(self._limits, self._pages or Path())
        return Page(self._browsers, _SCRIPT.read_text())


def create(settings: object) -> PageKind:
    return PageKind(settings if isinstance(settings, Settings) else None)


def action_of(reply: str) -> Json | None:
    """The action in the last line of a reply; None if there is none.

    >>> action_of('The name goes into the field.\\ntype 2 "Ida"')
    {'verb': 'type', 'number': 2, 'text': 'Ida'}
    >>> action_of("click Ok") is None
    True
    """
    lines = reply.strip()[-_MOST_REPLY_CHARS:].splitlines()
    found = _ACTION.fullmatch(lines[-1].strip()) if lines else None
    if found is None or (found[1] == "click") != (found[3] is None):
        return None
    text = (found[3] or "").strip()
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]
    return {"verb": found[1], "number": int(found[2]), "text": text}


def shown(answer: Json) -> str:
    """What a page shows, a line for each text and control; whatever it holds, the text is bounded.

    >>> shown({"lines": [{"kind": "checkbox", "name": "a", "on": False, "number": 1}]})
    '1 checkbox "a" off'
    """
    lines: object = answer.get("lines")
    given = cast(list[object], lines)[: _MOST["lines"]] if isinstance(lines, list) else []
    told = [_line(cast(Json, one)) for one in given if isinstance(one, dict)]
    text = "\n".join(told or ["The page is empty."])
    if answer.get("more") or len(text) > MOST_SHOWN:
        text = f"{text[:MOST_SHOWN]}\n(more is left out)"
    return text


def _line(found: Json) -> str:
    number, options = found.get("number"), found.get("options")
    parts = [str(number)] if type(number) is int else []
    parts += [_clean(found.get("kind"))]
    if (name := _quoted(found.get("name"))) != '""':
        parts.append(name)
    if "on" in found:
        parts.append("on" if found["on"] is True else "off")
    if "value" in found:
        parts.append(f"holds {_quoted(found['value'])}")
    if isinstance(options, list):
        given = cast(list[object], options)[: _MOST["options"]]
        parts.append(f"of {', '.join(map(_quoted, given))}")
    return " ".join(parts)


def _quoted(text: object) -> str:
    """A text of a page between quotes; it has none itself, so that it cannot look like more."""
    return '"' + _clean(text).replace('"', "'") + '"'


def _clean(text: object, most: int = _MOST["chars"]) -> str:
    """A text of a page in one line, its invisible characters by their code."""
    given = text[:most] if isinstance(text, str) else ""
    return "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in given)


def _package() -> Path | None:
    """The pages of the package miniwob, which is not imported: that needs Selenium."""
    found = importlib.util.find_spec("miniwob")
    return Path(found.origin).parent / "html" if found and found.origin else None
