"""`nextstate turns`: a person reads who said what, finds a turn and sees the whole of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nextstate.app import finding
from nextstate.app.cli import main
from nextstate.app.terminal import fitted
from nextstate.app.turn_views import message_text
from nextstate.config import StoreConfig
from nextstate.records import Feedback, Json, NextState, Source, Timings, Turn, TurnKind, Verdict
from nextstate.store import Store
from nextstate.store.lookup import Choice
from nextstate.store.shares import OWNER
from tests.store.test_growth import fill, steps
from tests.store.test_records import add, judge, turn

HOUR = 3600.0
START = 1_800_000_000.0


def said(role: str, text: str, **more: object) -> Json:
    return {"role": role, "content": text, **more}


def talk(number: int, message: Json, reply: str, **changes: object) -> Turn:
    return turn(
        number,
        request={"messages": [said("system", "Be kind."), message]},
        reply=said("assistant", reply),
        timings=Timings(START + HOUR * number, 0.1, 2.5),
        **changes,
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six turns, an hour apart: a person, a tool, a side turn, an environment and two of bob."""
    folder = tmp_path_factory.mktemp("turns")
    store = Store(StoreConfig(dir=str(folder / "state")))
    call = said("assistant", "", tool_calls=[{"function": {"name": "ls", "arguments": "{}"}}])
    add(
        store,
        talk(0, said("user", "List my files."), "Sure."),
        next_state="No, only the hidden ones.",
    )
    second = talk(1, said("user", "<b>No, only the hidden ones.</b>"), "", parent="turn_0")
    second = turn(1, request=second.request, reply=call, parent="turn_0", timings=second.timings)
    with store.recording() as recording:
        recording.add_turn(second, b"1" * 16, b"1" * 16, client_session="laptop")
        states = [NextState("turn_1", Source.TOOL, ".profile", 0.4)]
        recording.add_next_states("turn_1", True, states)
    changes = {"parent": "turn_1", "untrainable": "the reply was cut at the client"}
    add(store, talk(2, said("tool", ".profile"), "It is .profile.", **changes), next_state=None)
    title = talk(3, said("user", "A title?"), "Files", kind=TurnKind.SIDE, session="titles")
    add(store, title, next_state=None)
    store.training.hold_out("main", lambda _: False)
    add(store, talk(4, said("user", "Hello"), "Hi", lineage="bob", session="b"), next_state="ok")
    add(store, talk(5, said("user", "Again"), "Hi", lineage="bob", session="b"), next_state=None)
    judge(store, 0, -1, hint="Show hidden files.")
    store.judging.settle_verdict(Verdict("turn_4", (0, 1, 0), 0, "rules"))
    store.reviewing.give(Feedback("turn_0", -1, "Only hidden files.", "It showed all."), OWNER)
    store.close()
    file = folder / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{folder}/state"\n[agents]\nprofile = "openclaw"\n')
    return file


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def run(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> list[str]:
    capsys.readouterr()
    assert main(["turns", *arguments, "--config", str(config)]) == 0
    return capsys.readouterr().out.splitlines()


def ids(lines: list[str]) -> list[int]:
    return [int(line.split()[0].removeprefix("turn_")) for line in lines]


def refusal(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["turns", *arguments, "--config", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_line_says_who_said_what_and_what_was_replied(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, config) == [
        "turn_0  v0 -1  person: List my files.  →  Sure.",
        "turn_1  v0  ·  person: No, only the hidden ones.  →  [calls ls {}]",
        "turn_2  v0  ·  tool: .profile  →  It is .profile.  ✗ the reply was cut at the client",
        "turn_3  v0  ·  person: A title?  →  Files  ✗ side turn",
        "turn_4  v0 +0  person: Hello  →  Hi  ✗ score 0 without a hinted prom…",
        "turn_5  v0  ·  person: Again  →  Hi",
    ]


@pytest.mark.parametrize("width", [40, 80, 133])
def test_a_line_is_no_wider_than_the_terminal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    width: int,
) -> None:
    from rich.cells import cell_len

    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    texts = [
        "谢" * 500,
        "word " * 900,
        "e\u0301" * 4000,
        "🙂" * 99,
        "",
        " \n" * 90,
        "\x1b[31m" * 99,
    ]
    for number, text in enumerate(texts):
        one = talk(number, said("user", text), text, id=f"turn_{number:020x}", untrainable="x" * 99)
        add(store, one, next_state=None)
    store.close()
    file = tmp_path / "n.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    monkeypatch.setenv("COLUMNS", str(width))
    shown = run(capsys, file)
    assert len(shown) == len(texts)
    assert max(map(cell_len, shown)) <= max(width, 80)
    assert max(map(len, shown)) < 4 * 133 + 99
    assert [line for line in shown if not line.isprintable()] == []


def test_what_is_cut_ends_with_a_mark() -> None:
    assert fitted("four words are here", 10) == "four word…"
    assert fitted("日本語です", 6) == "日本…"
    assert fitted(" \n a\x1b[31mred\x1b[0m\x07b ", 20) == "ared b"
    assert fitted("a" * 1_000_000, 3) == "aa…"
    assert fitted("\u0301" * 100, 5).endswith("…")


def test_a_message_of_parts_and_calls_is_text() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert message_text({"content": [picture]}) == "[image]"
    assert message_text({"content": [{"type": "text", "text": "See"}, picture]}) == "See"
    blocks = [{"type": "tool_use", "name": "ls"}, {"type": "tool_result", "content": "a b"}]
    assert message_text({"content": blocks}) == "[calls ls]\na b"
    for odd in ({}, {"content": 7}, {"content": None, "tool_calls": "x"}, {"tool_calls": [{}]}):
        assert isinstance(message_text(odd), str)


def test_json_is_as_it_was_before_there_were_lines_for_people(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte: programs read it."""
    first, *_, last = run(capsys, config, "--json")
    assert first == (
        '{"turn":"turn_0","session":"s","index":0,"episode":null,"step":null,"kind":"main",'
        '"lineage":"main","version":0,"engine":null,"trainable":true,"reason":null,"next_state":'
        '[{"source":"user","text":"No, only the hidden ones."}],"verdict":{"score":-1,"votes":[],'
        '"hint":"Only hidden files.","judge":"feedback"},"feedback":{"score":-1,"comment":'
        '"It showed all."}}'
    )
    assert last == (
        '{"turn":"turn_5","session":"b","index":5,"episode":null,"step":null,"kind":"main",'
        '"lineage":"bob","version":0,"engine":null,"trainable":true,"reason":null,"next_state":[],'
        '"verdict":null,"feedback":null}'
    )


def test_json_lists_all_turns_oldest_first_unless_there_is_a_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    add(store, *(turn(number) for number in range(450)))
    store.close()
    file = tmp_path / "n.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n')

    def listed(*arguments: str) -> list[int]:
        rows = [json.loads(line) for line in run(capsys, file, "--json", *arguments)]
        return [int(row["turn"].removeprefix("turn_")) for row in rows]

    assert listed() == listed("--limit", "0") == [*range(450)]
    assert listed("--limit", "2") == [448, 449]
    assert ids(run(capsys, file)) == [*range(400, 450)]
    assert ids(run(capsys, file, "--limit", "0")) == [*range(450)]


def test_the_whole_turn_is_shown_by_the_beginning_of_its_id(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = run(capsys, config, "turn_0")
    assert card[:3] == ["turn         turn_0", "session      s, turn 0", "kind         main turn"]
    assert "trains       yes: it waits for an update" in card
    body = card[card.index("── system") :]
    assert body == [
        *("── system", "  Be kind.", "", "── user", "  List my files.", ""),
        *("── reply", "  Sure.", "", "── next state: user, trust 0.9"),
        *("  No, only the hidden ones.", "", "── verdict: -1 by feedback", ""),
        *("── hint", "  Only hidden files.", "", "── feedback: -1", "  It showed all.", ""),
        *("── a person's hint", "  Only hidden files."),
    ]
    cut = run(capsys, config, "turn_2")
    assert "trains       no: the reply was cut at the client" in cut
    assert "continues    turn_1" in cut
    assert not [line for line in cut if line.startswith("client name")]
    assert "client name  laptop" in run(capsys, config, "turn_1")
    assert "trains       no: a side turn is never judged or trained" in run(
        capsys, config, "turn_3"
    )
    assert "── verdict: +0 by rules, votes +0 +1 +0" in run(capsys, config, "turn_4")
    assert "trains       not yet: nothing has followed it" in run(capsys, config, "turn_5")
    (found,) = (json.loads(line) for line in run(capsys, config, "turn_2", "--json"))
    assert found["turn"] == "turn_2"
    assert found["request"]["messages"][1] == {"role": "tool", "content": ".profile"}
    assert found["reply"]["content"] == "It is .profile."
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    add(store, turn(1, id="turn_aab"), turn(2, id="turn_abb"), turn(3, id="turn_ab"))
    store.close()
    file = tmp_path / "n.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    assert run(capsys, file, "turn_aa")[0].endswith(" turn_aab")
    assert run(capsys, file, "turn_ab")[0].endswith(" turn_ab")
    assert refusal(capsys, file, "turn_a").endswith(
        "several turns begin with 'turn_a': turn_aab, turn_ab, turn_abb; name one of them"
    )
    assert "there is no turn 'turn_x': see" in refusal(capsys, file, "turn_x")


def test_filters_choose_by_session_lineage_time_training_and_text(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: START + 5.5 * HOUR)
    for chosen, expected in (
        (["--session", "b"], [4, 5]),
        (["--session", "s"], [0, 1, 2]),
        (["--session", "laptop"], [1]),  # the client's own name
        (["--session", "laptop:7"], [1]),  # with the epoch that OpenClaw counts
        (["--session", "none"], []),
        (["--lineage", "bob"], [4, 5]),
        (["--since", "2h"], [4, 5]),
        (["--since", "90m"], [4, 5]),
        (["--since", "3d"], [0, 1, 2, 3, 4, 5]),
        (["--since", "2027-01-15T11:00:00+00:00"], [3, 4, 5]),
        (["--since", "2035-01-01"], []),
        (["--untrained"], [2, 3, 4]),
        (["--untrained", "--lineage", "bob"], [4]),
        (["--grep", "hidden  ONES"], [0, 1]),  # what followed counts
        (["--grep", ".profile"], [1, 2]),
        (["--grep", "ones only"], []),
        (["--grep", "hi", "--since", "2h"], [4, 5]),
        (["--grep", "Be kind"], []),  # earlier messages do not: they are those of other turns
    ):
        assert ids(run(capsys, config, *chosen)) == expected, chosen
        assert ids(run(capsys, config, *chosen, "--limit", "0")) == expected, chosen
        assert ids(run(capsys, config, *chosen, "--limit", "1")) == expected[-1:], chosen
        rows = [json.loads(line) for line in run(capsys, config, "--json", *chosen)]
        assert [row["turn"] for row in rows] == [f"turn_{n}" for n in expected]


def test_pages_join_without_a_gap_and_name_the_next_one(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["turns", "--limit", "2", "--config", str(config)]
    pages: list[list[int]] = []
    before: list[str] = []
    while not pages or before:
        assert main([*arguments, *before]) == 0
        shown = capsys.readouterr()
        pages.append(ids(shown.out.splitlines()))
        before = shown.err.split()[-2:] if "older ones: --before" in shown.err else []
    assert pages == [[4, 5], [2, 3], [0, 1]]
    assert ids(run(capsys, config, "--limit", "0", "--before", "turn_2")) == [0, 1]
    assert ids(run(capsys, config, "--session", "s", "--before", "turn_4")) == [0, 1, 2]


def test_a_filter_that_cannot_be_meant_is_one_clear_error(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in ("yesterday", "2x", "", "2026-13-01", "-3d", "9999999d", "3 d", "\x1b[2J"):
        line = refusal(capsys, config, f"--since={wrong}")
        assert line.startswith(f"nextstate: --since {wrong!r} is neither a duration such as 30m")
    assert "--grep '  ' has no words" in refusal(capsys, config, "--grep", "  ")
    assert "there is no turn 'turn_9'" in refusal(capsys, config, "--before", "turn_9")
    assert "--lineage 'carol' has no turn here; known: main" in refusal(
        capsys, config, "--lineage", "carol"
    )
    assert "several turns begin with 'turn_'" in refusal(capsys, config, "--before", "turn_")


def test_a_turn_that_a_retry_replaced_is_not_listed_but_can_be_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    place = b"p" * 16
    with store.recording() as recording:
        for number in range(2):
            recording.add_turn(turn(number), b"k" * 16, b"k" * 16, place=place)
            recording.replace_cut(place, f"turn_{number}")
    store.close()
    file = tmp_path / "n.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    assert ids(run(capsys, file)) == [1]
    assert "replaced by  turn_1" in run(capsys, file, "turn_0")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    """A store of 800 turns and one of four times as many."""
    found = [Store(StoreConfig(dir=str(tmp_path_factory.mktemp("store")))) for _ in range(2)]
    for store, sessions in zip(found, (40, 160), strict=True):
        fill(store, sessions, ready=0)
    return found


@pytest.mark.parametrize(
    "choice",
    [
        Choice(),
        Choice(sessions=("s3", "s4")),
        Choice(lineages=("nobody",)),
        Choice(since=2.0),
        Choice(untrained=True),
        Choice(since=0.5),
        Choice(since=0.5, lineages=("nobody",)),
    ],
)
def test_the_newest_turns_cost_the_same_in_a_large_store(
    stores: list[Store], choice: Choice
) -> None:
    def look(store: Store) -> None:
        finding.newest(store, choice, 20, most=400)

    small, large = (steps(store, look) for store in stores)
    assert large <= 1.5 * small + 300, (small, large)


def test_a_search_that_gives_up_says_where_it_goes_on(stores: list[Store]) -> None:
    nobodys = Choice(lineages=("nobody",))
    assert finding.newest(stores[0], nobodys, 20, most=200) == ([], "turn_600", True)
    assert finding.newest(stores[0], nobodys, 20, "turn_100") == ([], None, False)


def test_a_search_for_words_reads_pages_until_it_has_enough(stores: list[Store]) -> None:
    def newest(store: Store) -> list[str]:
        found = finding.newest(store, Choice(), 2, words=("question",))
        return [turn.id for turn in found.turns]

    def first(store: Store) -> str:
        return next(finding.every(store, Choice(), words=("question 7",))).id

    _, large = stores
    assert newest(large) == ["turn_3198", "turn_3199"]
    assert first(large) == "turn_7"
    assert finding.newest(large, Choice(), 2, words=("question 77777",)).turns == []
    for work in (newest, first):
        cost, cost_of_large = (steps(store, work) for store in stores)
        assert cost_of_large <= 1.5 * cost + 300


def test_the_persons_words_are_shown_and_not_what_the_agent_put_behind_them(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behind = said("user", "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\nHints\n")
    request = {"messages": [said("user", "List my files."), behind]}
    add(store, turn(0, request=request, reply=said("assistant", "Sure.")), next_state=None)
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    assert run(capsys, file) == ["turn_0  v0  ·  person: List my files.  →  Sure."]
