"""What models and people wrote is shown as text, whatever it holds."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.app.page.texts import MOST_SHOWN, message_text, short, visible
from nextstate.episodes import Episode
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from tests.page.running_page import Site, on_site
from tests.store.test_records import add, judge, turn

HOSTILE = (
    "<script>alert(1)</script>",
    "</p></article></main><script src=//evil.example></script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><style>*{display:none}</style>",
    "</textarea></title><iframe src=javascript:alert(1)>",
    "{{ 7 * 7 }}{% raw %}<b>",
    "<!--<base href=//evil.example>",
    "<form action=//evil.example><input name=token>",
    "<a href=javascript:alert(1)>x</a>",
    "&lt;script&gt;&#x3c;script>",
)
ATTRIBUTES = {
    *("action", "aria-current", "aria-hidden", "aria-label", "aria-labelledby", "autocomplete"),
    *("charset", "checked", "class", "colspan", "content", "cx", "cy", "dir", "for", "height"),
    *("href", "id", "inputmode", "lang", "maxlength", "method", "name", "pattern", "r", "rel"),
    *("role", "rows", "rx", "scope", "size", "text-anchor", "type", "value", "viewbox", "width"),
    *("x", "x1", "x2", "y", "y1", "y2", "autofocus", "required", "defer", "src", "tabindex"),
    *("hx-get", "hx-select", "hx-sse:connect", "hx-swap", "hx-target", "hx-trigger", "selected"),
}


class Reader(HTMLParser):
    """Reads a page as a browser does: its tags, attributes and addresses."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.addresses: set[str] = set()
        self.text = ""
        self.scripts: set[str] = set()
        """The addresses of scripts; one without an address is an empty one."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "script":
            self.scripts.add(dict(attrs).get("src") or "")
        for name, value in attrs:
            self.attributes.add(name)
            if name in ("href", "action", "src"):
                self.addresses.add(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    found = Reader()
    found.feed(page)
    found.close()
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_stays_a_text_wherever_it_is_shown(
    store: Store, tmp_path: Path, text: str
) -> None:
    add(
        store,
        turn(
            0,
            session=text,
            client_model=text,
            finish_reason=text[:40],
            parent=text[:40],
            request={
                "messages": [{"role": text, "content": text}, {"role": "user", "content": text}]
            },
            reply={"role": "assistant", "content": text, "reasoning": text},
        ),
        next_state=text,
    )
    add(store, turn(1, untrainable=text, session=text), next_state=None)
    judge(store, 0, -1, text)
    version = PolicyVersion("main", 1, 0, None, None, 1, VersionState.REJECTED, {text: 1.0}, text)
    store.versions.add(version, None)
    folder = store.dir / "learner" / "main"
    folder.mkdir(parents=True)
    (folder / "problem").write_text(text)
    name = "e-1"
    store.episodes.open([Episode(name, "main", "shell", text, metadata={text: text})], None)
    add(store, turn(2, reply={"content": text}, session=name, episode=name, step=0))
    paths = (
        *("/", "/page/turns", "/page/turns/turn_0", "/page/turns/turn_1", "/page/versions"),
        *("/page/sessions", f"/page/session?name={quote(text)}", "/page/episodes"),
        *("/page/episodes/e-1", "/page/running"),
    )

    async def test(site: Site) -> None:
        for path in (*paths, "/page/versions/main/1"):
            found = read(await site.get(path))
            assert text in found.text
            assert found.scripts <= {"/page/htmx/htmx.min.js", "/page/htmx/hx-sse.min.js"}
            assert not found.tags & {"style", "iframe", "img", "base", "b", "object"}
            assert found.attributes <= ATTRIBUTES
            ours = found.addresses - {"#main"}
            assert all(one.startswith("/") and one[1:2] != "/" for one in ours)
        answer = await site.http.get(f"{site.url}/page/turns/turn_0/text/m1")
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert await answer.text() == text

    on_site(test, store, tmp_path)


HIDDEN = [
    *("\x00", "\x1b[2J", "\x07", "\x7f", "\x85", "\x9b", "\r", "\xad", "\u061c", "\u200b"),
    *("\u200e", "\u200f", "\u202a", "\u202e", "\u2066", "\u2069", "\u2028", "\u2029", "\ufeff"),
    *("\U000e0041", "\ufff9", "\u3164", "\ud800"),
]


@pytest.mark.parametrize("text", HIDDEN)
def test_characters_that_hide_or_reorder_are_shown_as_their_code(text: str) -> None:
    assert visible(f"a{text}b") == f"a⟦U+{ord(text[0]):04X}⟧{text[1:]}b"


@pytest.mark.parametrize(
    "text", ["\n\t a", "שלום", "سلام", "👩\u200d💻", "日本語", "नमस\u200dते", "é"]
)
def test_what_people_write_is_left_as_it_is(text: str) -> None:
    assert visible(text) == text


@given(st.text())
def test_nothing_invisible_remains(text: str) -> None:
    shown = visible(text)
    assert visible(shown) == shown
    assert shown.encode().decode() == shown


def test_hidden_characters_of_a_turn_reach_no_page(store: Store, tmp_path: Path) -> None:
    text = "safe \u202egnp.exe\x1b]0;x\x07"
    add(store, turn(0, request={"messages": [{"role": "user", "content": text}]}), next_state=text)

    async def test(site: Site) -> None:
        for path in ("/page/turns", "/page/turns/turn_0", "/page/turns/turn_0/text/m0"):
            page = await site.get(path)
            assert "⟦U+202E⟧gnp.exe⟦U+001B⟧" in page
            assert not set(page) & {"\u202e", "\x1b", "\x07"}

    on_site(test, store, tmp_path)


def test_a_text_in_a_list_is_short() -> None:
    assert short("a\n b  c") == "a b c"
    assert len(short("x" * 10_000_000)) < 300
    assert short(" " * 5000 + "x") == "…"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({}, ""),
        ({"content": 3, "tool_calls": 4, "reasoning": 5}, ""),
        ({"content": ["a", {"type": "text", "text": "b"}, {"text": 3}, 7]}, "a\nb\n[part]"),
        ({"content": None, "tool_calls": [{"id": "c"}, 3]}, '[tool call] {"id":"c"}'),
        ({"content": "\ud800"}, "?"),
    ],
)
def test_any_message_has_a_text(message: dict[str, object], text: str) -> None:
    assert message_text(message) == text


def test_the_limit_of_a_message_is_what_the_page_shows(store: Store, tmp_path: Path) -> None:
    add(store, turn(0, reply={"content": "\u202e" * (MOST_SHOWN + 1)}), next_state=None)

    async def test(site: Site) -> None:
        page = await site.get("/page/turns/turn_0")
        assert page.count("⟦U+202E⟧") == MOST_SHOWN
        assert "1 more characters" in page

    on_site(test, store, tmp_path)
