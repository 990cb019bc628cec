"""What the policy of `gui` is taught at first: episodes of an agent with bad habits.

The pages are imitated here: a browser takes longer than a step of training. Their words are made
up, so the policy has seen none of MiniWoB's before it learns; of the page that never trains it has
seen nothing.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from demo.corpus import Line
from plugins.environments.gui import HOW, shown

MOST_CALLS = 8
SLIPS = {
    "click-button": 0.8,
    "click-link": 0.8,
    "enter-text": 0.55,
    "click-checkboxes": 0.45,
    "login-user": 0.4,
    "choose-list": 0.55,
}
"""By page: how often a step follows a habit."""
OVER = "The task is over."
Element = dict[str, Any]


@dataclass(slots=True)
class Made:
    """A page, and how it is solved."""

    query: str
    lines: list[Element]
    right: list[str]
    """The actions that solve it."""
    ends: int
    """The number of the control that ends the task; 0: any button or link does."""


def draw_episode(rng: Random) -> list[Line]:
    """One episode as a conversation."""
    page = rng.choice([*PAGES])
    return list(_episode(rng, SLIPS[page], PAGES[page](rng)))


def opening(made: Made) -> str:
    """What the agent sees first."""
    return f"{made.query}\n{shown({'lines': made.lines})}\n{HOW}"


def act(made: Made, action: str) -> str:
    """Changes the page; returns what the agent sees then."""
    verb, number, *text = action.split(" ", 2)
    line = next(one for one in made.lines if one.get("number") == int(number))
    if verb in ("type", "select"):
        line["value"] = text[0]
    elif "on" in line:
        line["on"] = not line["on"]
    elif line["kind"] in ("button", "item"):
        return OVER
    return shown({"lines": made.lines})


def _episode(rng: Random, slips: float, made: Made) -> Iterator[Line]:
    at = 0
    yield Line("user", opening(made))
    for _ in range(MOST_CALLS):
        is_right = rng.random() >= slips or (at and at == len(made.right) - 1)
        action = made.right[at] if is_right else _habit(rng, made, at)
        yield Line("assistant", action, imitate=True)
        seen = act(made, action)
        if seen == OVER:
            return
        at = min(at + 1, len(made.right) - 1)
        yield Line("user", seen)


def _habit(rng: Random, made: Made, at: int) -> str:
    """Ends too early, or takes the first control in the place of the right one."""
    if made.ends:
        return f"click {made.ends}"
    numbers = [one["number"] for one in made.lines if one["kind"] in ("button", "item")]
    others = [number for number in numbers if f"click {number}" != made.right[at]]
    return f"click {rng.choice(others or numbers)}"


def _word(rng: Random) -> str:
    syllables = (rng.choice(_CONSONANTS) + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
    return "".join(syllables) + rng.choice(("", "", *"nrst"))


_CONSONANTS = "bcdfghjklmnpqrstvwxyz"


def _name(rng: Random) -> str:
    return _word(rng).capitalize()


def _code(rng: Random, most: int) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(2, most)))


def _texts(rng: Random) -> Element:
    return {"kind": "text", "name": " ".join(_word(rng) for _ in range(rng.randint(1, 6)))}


def _numbered(lines: Sequence[Element]) -> list[Element]:
    number, found = 0, list[Element]()
    for one in lines:
        number += one["kind"] != "text"
        found.append(one if one["kind"] == "text" else {**one, "number": number})
    return found


def _among(kind: str, query: str, name: Callable[[Random], str]) -> Callable[[Random], Made]:
    """A page with several controls of a kind between others, of which one is to be clicked."""

    def make(rng: Random) -> Made:
        names = list(dict.fromkeys(name(rng) for _ in range(rng.randint(1, 5))))
        lines: list[Element] = [{"kind": kind, "name": one} for one in names]
        for _ in range(rng.randint(0, 4)):
            other = _texts(rng)
            if kind == "button" and rng.random() < 0.5:
                other = {"kind": "input", "name": "", "value": ""}
            lines.insert(rng.randint(0, len(lines)), other)
        lines, asked = _numbered(lines), rng.choice(names)
        right = [one["number"] for one in lines if one["name"] == asked and one["kind"] == kind]
        return Made(query.format(asked), lines, [f"click {right[0]}"], 0)

    return make


def _enter(rng: Random) -> Made:
    name = _name(rng)
    lines = _numbered([_field("input"), {"kind": "button", "name": "Submit"}])
    query = f'Enter "{name}" into the text field and press Submit.'
    return Made(query, lines, [f"type 1 {name}", "click 2"], 2)


def _field(kind: str) -> Element:
    return {"kind": kind, "name": "", "value": ""}


def _boxes(rng: Random) -> Made:
    names = list(dict.fromkeys(_code(rng, 7) for _ in range(rng.randint(2, 6))))
    asked = sorted(rng.sample(range(len(names)), rng.randint(1, len(names))))
    boxes: list[Element] = [{"kind": "checkbox", "name": one, "on": False} for one in names]
    lines = _numbered([*boxes, {"kind": "button", "name": "Submit"}])
    ends = len(lines)
    right = [*(f"click {i + 1}" for i in asked), f"click {ends}"]
    return Made(
        f"Select {', '.join(names[i] for i in asked)} and click Submit.", lines, right, ends
    )


def _log_in(rng: Random) -> Made:
    name, password = _word(rng), _code(rng, 4)
    labels = ({"kind": "text", "name": text} for text in ("Username", "Password"))
    first, second = labels
    button = {"kind": "button", "name": "Login"}
    lines = _numbered([first, _field("input"), second, _field("password"), button])
    query = f'Enter the username "{name}" and the password "{password}" into the text fields and '
    return Made(
        f"{query}press login.", lines, [f"type 1 {name}", f"type 2 {password}", "click 3"], 3
    )


def _choose(rng: Random) -> Made:
    options = list(dict.fromkeys(_name(rng) for _ in range(rng.randint(5, 9))))
    if rng.random() < 0.3:
        options[-1] += f" {_name(rng)}"
    asked = rng.choice(options)
    chooser = {"kind": "list", "name": "", "value": options[0], "options": options}
    lines = _numbered([chooser, {"kind": "button", "name": "Submit"}])
    query = f"Select {asked} from the list and click Submit."
    return Made(query, lines, [f"select 1 {asked}", "click 2"], 2)


PAGES: dict[str, Callable[[Random], Made]] = {
    "click-button": _among("button", 'Click on the "{}" button.', _name),
    "click-link": _among("item", 'Click on the link "{}".', _word),
    "enter-text": _enter,
    "click-checkboxes": _boxes,
    "login-user": _log_in,
    "choose-list": _choose,
}
