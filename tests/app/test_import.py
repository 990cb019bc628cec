"""`nextstate import`: what is read, what is kept, and that nobody takes it for a person's word."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.app.cli import main
from nextstate.app.json_values import MOST_BYTES, Broken, Found, json_objects
from nextstate.config import StoreConfig
from nextstate.records import Feedback, Turn, TurnKind
from nextstate.store import Store
from nextstate.store.shares import OWNER
from tests.proxy.running_proxy import Running, both, request
from tests.scripted_engine import ScriptedEngine

HI, HELLO = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}
OPENAI = {"messages": [HI, HELLO]}
SHAREGPT = {
    "system": "Be kind.",
    "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello!"}],
}


def entry(id_: str, parent: str | None, role: str, content: Any, **more: Any) -> dict[str, Any]:
    message = {"role": role, "content": content, **more}
    return {"type": "message", "id": id_, "parentId": parent, "message": message}


CALL = {"type": "toolCall", "id": "c1", "name": "ls", "arguments": {"path": "."}}
SESSION = [
    {"type": "session", "version": 3, "id": "s", "cwd": "/home/me"},
    entry("a", None, "user", [{"type": "text", "text": "Which files?"}]),
    entry("b", "a", "assistant", [{"type": "thinking", "thinking": "Hm."}, CALL], model="m"),
    entry("c", "b", "toolResult", [{"type": "text", "text": "a.txt"}], toolCallId="c1"),
    entry("gone", "b", "user", "Another branch."),
    {"type": "compaction", "id": "k", "parentId": "c", "summary": "…"},
    entry("d", "k", "assistant", [{"type": "text", "text": "One: a.txt."}]),
    {"type": "reset", "id": "r", "parentId": "d"},
    entry("e", "r", "user", "Hi."),
    entry("f", "e", "assistant", "Hello!"),
    entry("g", "f", "user", "Nobody answers this."),
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n[lineages.alice]\nmodel = "alice"\n')
    return file


def lines(values: Sequence[object]) -> str:
    return "".join(f"{json.dumps(value)}\n" for value in values)


def imported(config: Path, text: str | bytes, *more: str) -> list[Turn]:
    """What the store holds after the import of a file with this text."""
    file = config.with_name("chats.json")
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    assert main(["import", str(file), *more, "--config", str(config)]) == 0
    with closing(Store(StoreConfig(dir=f"{config.parent}/state"))) as store:
        found = [store.turns.get(turn) for turn in store.turns.ids()]
    return [turn for turn in found if turn is not None]


@pytest.mark.parametrize(
    "text",
    [
        lines([OPENAI, SHAREGPT]),
        json.dumps([OPENAI, SHAREGPT]),
        json.dumps([OPENAI, SHAREGPT], indent=2),
        "\n\n" + json.dumps(OPENAI, indent=1) + "\n" + json.dumps(SHAREGPT),
        b"\xef\xbb\xbf" + lines([OPENAI, SHAREGPT]).encode(),
        lines([OPENAI, SHAREGPT]).replace("\n", "\r\n"),
    ],
)
def test_conversations_are_read_as_lines_or_as_one_list(config: Path, text: str | bytes) -> None:
    first, second = imported(config, text)
    assert (first.request["messages"], first.reply) == ([HI], HELLO)
    kind = {"role": "system", "content": "Be kind."}
    assert (second.request["messages"], second.reply) == ([kind, HI], HELLO)


def test_a_session_of_openclaw_is_the_way_to_its_last_entry_and_a_reset_divides_it(
    config: Path,
) -> None:
    first, second = imported(config, lines(SESSION))
    function = {"name": "ls", "arguments": '{"path":"."}'}
    call = {"id": "c1", "type": "function", "function": function}
    assert first.client_model == "m"
    assert first.request["messages"] == [
        {"role": "user", "content": "Which files?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "a.txt", "tool_call_id": "c1"},
    ]
    assert first.reply == {"role": "assistant", "content": "One: a.txt."}
    assert (second.request["messages"], second.reply) == ([HI], HELLO)


def test_entries_without_parents_are_in_their_order(config: Path) -> None:
    said = [*SESSION[:4], SESSION[6]]
    bare = [{k: v for k, v in found.items() if k != "parentId"} for found in said]
    (turn,) = imported(config, lines(bare))
    assert [message["role"] for message in turn.request["messages"]] == [
        "user",
        "assistant",
        "tool",
    ]


def test_what_was_imported_is_neither_judged_nor_trained_and_no_request_continues_it(
    config: Path, tmp_path: Path
) -> None:
    (before,) = imported(config, lines([OPENAI]), "--lineage", "alice")
    assert (before.kind, before.lineage, before.trainable) == (TurnKind.IMPORTED, "alice", False)
    with closing(Store(StoreConfig(dir=f"{tmp_path}/state"))) as store:

        async def test(engine: ScriptedEngine, p: Running) -> None:
            body = request("Now what?")
            body["messages"] = [HI, HELLO, *body["messages"]]
            assert (await p.chat(body))[0] == 200
            assert (await p.chat(request(), {"X-Turn-Type": "imported"}))[0] == 200

        both(test, store, tmp_path)
        _, *turns = [store.turns.get(turn) for turn in store.turns.ids()]
        assert [turn and (turn.parent, turn.kind) for turn in turns] == [(None, TurnKind.MAIN)] * 2
        assert store.turns.next_states(before.id) == ()
        assert store.judging.lease(9, 60) == []
        given = store.reviewing.give(Feedback(before.id, 1), OWNER)
        assert not given.applied
        assert store.judging.verdict(before.id) is None
        assert store.counts()["turns/imported"] == 1
        assert store.training.ready_samples("alice", scored=True, hinted=True) == 0


def test_importing_again_adds_nothing_and_another_lineage_has_its_own(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = lines([OPENAI, {"messages": [HI]}, SHAREGPT])
    assert len(imported(config, text)) == len(imported(config, text)) == 2
    first, again = capsys.readouterr().out.splitlines()
    assert first.endswith(": 2 conversations imported, 0 were known, 1 without an answer, 0 broken")
    assert again.endswith(": 0 conversations imported, 2 were known, 1 without an answer, 0 broken")
    assert len(imported(config, text, "--lineage", "alice")) == 4


def test_only_sft_and_prompts_hand_it_out_and_only_on_wish(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported(config, lines([OPENAI, SHAREGPT]))
    rows: dict[str, list[Any]] = {}
    for name, what, *more in (
        ("a", "sft"),
        ("b", "sft", "--imported"),
        ("c", "prompts", "--imported"),
    ):
        out = config.with_name(f"{name}.jsonl")
        ended = main(["export", what, "--out", str(out), *more, "--config", str(config)])
        assert ended == (0 if more else 2)
        rows[name] = [json.loads(x) for x in out.read_text().splitlines()] if more else []
        assert out.exists() == bool(more)
    assert [row["messages"][-2:] for row in rows["b"]] == [[HI, HELLO]] * 2
    assert [row["prompt"][-1] for row in rows["c"]] == [HI] * 2
    out = str(config.with_name("d.jsonl"))
    assert main(["export", "kto", "--out", out, "--imported", "--config", str(config)]) == 2
    assert "--imported is for sft and prompts" in capsys.readouterr().err


GOOD = lines([OPENAI])
OTHER = lines([SHAREGPT])


OPEN = '{"messages": [{"role": "user", "content": "What'


@pytest.mark.parametrize(
    ("text", "told", "good"),
    [
        (GOOD + "\n{broken}\n" + OTHER, "line 3: this is no valid JSON object", 2),
        (GOOD + "hello\n" + OTHER, "line 2: expected JSON objects", 2),
        ("hello", "line 1: expected JSON objects", 0),
        (GOOD + OPEN + "\n" + OTHER, "line 2: the line ends within a text", 2),
        (GOOD + '{"messages": [\n' + OTHER, "line 2: the file ends within this value", 2),
        (GOOD + '{"messages": [', "line 2: the file ends within this value", 1),
        (GOOD + "}\n" + OTHER, "line 2: a bracket closes that none opens", 2),
        (GOOD + '{"text": "x"}\n' + OTHER, "line 2: expected a list under conversations or", 2),
        (
            GOOD + '{"messages": [{"role": "robot", "content": ""}]}\n' + OTHER,
            "line 2, messages[0]: expected a role",
            2,
        ),
        (
            GOOD + '{"messages": [{"role": "user"}]}',
            "line 2, messages[0]: expected a text or a list",
            1,
        ),
        (GOOD + '{"messages": ["hi"]}', "line 2, messages[0]: expected a message, found 'hi'", 1),
        (GOOD + '{"conversations": [{"from": "cat", "value": "x"}]}', "found cat", 1),
        (GOOD + '{"conversations": [{"from": "gpt"}]}', "line 2, conversations[0]", 1),
        (
            GOOD + '{"messages": [{"role": "user", "content": "\\ud800"}]}\n' + OTHER,
            "line 2: this is no valid JSON object",
            2,
        ),
        (
            GOOD.encode() + b'{"messages": ["\xff"]}\r\n' + OTHER.encode(),
            "line 2: this is not UTF",
            2,
        ),
        (GOOD + "\0" * 900 + "\n" + OTHER, "line 2: expected JSON objects", 2),
        ("[" + GOOD + ", {broken}, " + OTHER + "]", "line 2: this is no valid JSON object", 2),
        ("[" + GOOD + ", x\n, " + OTHER + "]", "What follows in this list is not read", 1),
        ("[" + GOOD + ", " + OTHER + ", {", "line 3: the file ends within this value", 2),
        (b"\x1f\x8b\x08\x00", "cannot be read: it is packed: unpack it with gunzip", 0),
        (GOOD.encode("utf-16"), "cannot be read: it is UTF-16: save it as UTF-8", 0),
    ],
)
def test_what_is_broken_is_named_and_counted_and_all_else_is_taken(
    config: Path, capsys: pytest.CaptureFixture[str], text: str | bytes, told: str, good: int
) -> None:
    file = config.with_name("chats.jsonl")
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["import", str(file), "--config", str(config)]) == 2
    output = capsys.readouterr()
    assert str(file) in output.err
    assert told in output.err
    assert f"{file}: {good} conversations imported, 0 were known" in output.out
    broken = 0 if "cannot be read" in told else 1
    assert output.out.endswith(f", {broken} broken\n")


def test_of_many_broken_lines_some_are_named_and_the_next_file_is_taken_too(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = config.with_name("a.jsonl"), config.with_name("b.jsonl")
    file.write_text("{broken}\n" * 50 + GOOD)
    other.write_text(OTHER)
    assert main(["import", str(file), str(other), "--config", str(config)]) == 2
    output = capsys.readouterr()
    assert output.err.count(f"{file}, line ") == 20
    assert "30 more are broken" in output.err
    assert f"{file}: 1 conversations imported, 0 were known, 0 without an answer, 50" in output.out
    assert f"{other}: 1 conversations imported" in output.out


def test_zeros_before_a_line_and_characters_of_every_kind_within_it_are_no_harm(
    config: Path,
) -> None:
    odd = "a\0b\u2028c\U0001f600\r\n"
    messages = [{"role": "user", "content": odd}, {**HELLO, "content": odd}]
    text = (
        "\0" * 99 + json.dumps({"messages": messages, "model": "m\0"}, ensure_ascii=False) + "\n\n"
    )
    (turn,) = imported(config, text.replace("a\0b", "a\\u0000b"))
    assert [*turn.request["messages"], turn.reply] == messages


@pytest.mark.parametrize(
    ("broken", "good"), [(0, 2), (4, 2), (10, 2), (1, 0), (2, 0), (3, 0), (6, 0), (7, 0), (9, 0)]
)
def test_a_session_is_taken_unless_its_way_needs_a_broken_line(
    config: Path, capsys: pytest.CaptureFixture[str], broken: int, good: int
) -> None:
    texts = [json.dumps(entry) for entry in SESSION]
    texts[broken] = texts[broken][:-1]
    file = config.with_name("session.jsonl")
    file.write_text("\n".join([*texts, OTHER]))
    assert main(["import", str(file), "--config", str(config)]) == 2
    output = capsys.readouterr()
    assert f"{file}, line {broken + 1}: " in output.err
    assert ("this session is left out" in output.err) == (good == 0)
    assert f"{file}: {good + 1} conversations imported" in output.out


def test_a_missing_file_and_an_unknown_lineage_are_told(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, told in (
        (["nowhere.json"], "there is no file nowhere.json"),
        ([str(config), "--lineage", "bob"], "--lineage 'bob': known are main, alice"),
    ):
        assert main(["import", *arguments, "--config", str(config)]) == 2
        assert told in capsys.readouterr().err


class Dripping(io.BytesIO):
    """A file whose reads bring few bytes."""

    def __init__(self, data: bytes, some: int) -> None:
        super().__init__(data)
        self.some = some

    def read(self, size: int | None = -1) -> bytes:
        return super().read(self.some)

    def readline(self, size: int | None = -1) -> bytes:
        return super().readline(size)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text('"\\{}[]a', max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(st.text('"\\{}[]a'), JSON, max_size=3), max_size=4)


@given(OBJECTS, st.integers(1, 7), st.sampled_from([None, 1]), st.booleans())
def test_objects_are_found_wherever_a_read_ends(
    values: list[Any], some: int, indent: int | None, as_list: bool
) -> None:
    texts = [json.dumps(value, indent=indent) for value in values]
    text = f"[{','.join(texts)}]" if as_list else "\n".join(texts)
    read = [*json_objects(Dripping(text.encode(), some), "f")]
    found = [one for one in read if isinstance(one, Found)]
    assert found == read
    assert [one.value for one in found] == values
    if not as_list:
        starts = [
            1 + sum(before.count("\n") + 1 for before in texts[:n]) for n in range(len(texts))
        ]
        assert [one.line for one in found] == starts


@given(OBJECTS, st.lists(st.integers(0, 3), max_size=6), st.data())
def test_a_cut_line_takes_no_other_with_it(
    values: list[Any], at: list[int], data: st.DataObject
) -> None:
    texts = [json.dumps({"messages": [value, {}]}) for value in values]
    whole = [*texts]
    for place in at:
        text = data.draw(st.sampled_from(["{broken}", *whole]))
        cut = text[: data.draw(st.integers(1, len(text) - 1))]
        texts.insert(place, cut)
    found = [*json_objects(io.BytesIO("\n".join(texts).encode()), "f")]
    taken = [one.value for one in found if isinstance(one, Found)]
    broken = [one.text for one in found if isinstance(one, Broken)]
    assert [json.dumps(value) for value in taken] == whole
    assert len(broken) == len({*broken}) == len(at)


def test_a_line_that_is_too_long_is_passed_over_before_it_fills_the_memory(tmp_path: Path) -> None:
    file = tmp_path / "f"
    with file.open("wb") as out:
        out.write(b'{"a": 1}\n{"b": "')
        for _ in range(100):
            out.write(b"x" * (1 << 20))
        out.write(b'"}\n{"c": 2}\n')
    tracemalloc.start()
    with file.open("rb") as opened:
        first, second, third = json_objects(opened, "f")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(second, Broken)
    assert second.text == "f, line 2: a line has more than 64 MiB"
    assert [one.value for one in (first, third) if isinstance(one, Found)] == [{"a": 1}, {"c": 2}]
    assert most < 3 * MOST_BYTES


class Endless(io.BytesIO):
    """A list with an object that does not end."""

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        self.given = getattr(self, "given", 0) + size
        return b'[{"a": "' + b"x" * (size - 8) if self.given == size else b"x" * size

    def seek(self, offset: int, whence: int = 0) -> int:
        self.given = 0
        return 0


def test_an_object_of_a_list_that_is_too_long_is_refused_before_it_fills_the_memory() -> None:
    file = Endless()
    (broken,) = json_objects(file, "f")
    assert isinstance(broken, Broken)
    assert broken.text.startswith("f, line 1: an object has more than 64 MiB")
    assert file.given < MOST_BYTES + (2 << 20)


def test_what_a_conversation_named_is_replaced_where_it_is_said_again(config: Path) -> None:
    said = [
        {"role": "user", "content": "The password is hunter2Xy9."},
        {"role": "assistant", "content": "Is hunter2Xy9 long enough?"},
    ]
    (turn,) = imported(config, lines([{"messages": said}]))
    assert turn.request["messages"][0]["content"] == "The password is [secret:password]."
    assert turn.reply["content"] == "Is [secret:password] long enough?"


def test_what_is_too_long_to_search_is_not_imported_in_clear(config: Path) -> None:
    long = {"role": "user", "content": "4155552671 " * 400_000}
    (turn,) = imported(config, lines([{"messages": [long, HELLO], "tools": [long]}]))
    assert turn.request["messages"] == [{"role": "user", "content": "[too long to search]"}]
    assert turn.reply["content"] == "[too long to search]"
