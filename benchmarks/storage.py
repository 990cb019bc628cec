"""How large is recorded traffic in the store, as a share of its raw size?

It replays OpenClaw's requests (gzipped, one JSON object a line with `headers`, `body` and `reply`)
through the recorder, without tokens and with them. The traffic has no token ids, so the ids come
from the demo's tokenizer and chat template. They know few words, so there are more ids than with a
larger model. The log-probs are random 32-bit floats.
"""

from __future__ import annotations

import argparse
import gzip
import sqlite3
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import orjson
from rich.console import Console
from rich.progress import Progress

from benchmarks.exchanges import exchange
from nextstate.config import StoreConfig
from nextstate.hooks import load_plugin
from nextstate.records import Json
from nextstate.store import Store
from proxy.exchange import record_exchange
from proxy.linking.names import explicit_session

_POLICY = Path(__file__).parent.parent / "demo" / "policy"
_GOAL = 0.1
_EXAMPLES = """\
example:
  python -m benchmarks.storage traffic.jsonl.gz
"""


@dataclass(frozen=True, slots=True)
class Line:
    """One request with its reply and their tokens."""

    headers: dict[str, str]
    body: Json
    reply: Json
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]

    @property
    def raw_bytes(self) -> int:
        """Bytes of the request and the reply as compact JSON."""
        return len(orjson.dumps(self.body)) + len(orjson.dumps(self.reply))

    @property
    def token_bytes(self) -> int:
        """Bytes of ids and log-probs as compact JSON."""
        return len(orjson.dumps([self.prompt_ids, self.completion_ids, self.logprobs]))


def read(path: Path) -> list[Line]:
    """The traffic with its tokens."""
    from transformers import AutoTokenizer  # pyright: ignore[reportMissingTypeStubs]

    tokenizer: Any = AutoTokenizer.from_pretrained(_POLICY)
    random = Random(1)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def line(raw: Json) -> Line:
        body, reply = raw["body"], raw["reply"]
        messages, tools = body["messages"], body.get("tools")
        prompt = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template([*messages, reply], tools=tools, tokenize=False)
        completion_ids = ids(whole.removeprefix(prompt))
        return Line(
            headers={name.lower(): value for name, value in raw["headers"]},
            body=body,
            reply=reply,
            prompt_ids=ids(prompt),
            completion_ids=completion_ids,
            logprobs=list(array("f", (-random.expovariate(2.0) for _ in completion_ids))),
        )

    with gzip.open(path) as file:
        return [line(orjson.loads(raw)) for raw in file]


def replay(lines: Sequence[Line], folder: Path, *, tokens: bool, progress: Progress) -> int:
    """Records the traffic into a new store; returns the database's bytes."""
    store, profile = Store(StoreConfig(dir=str(folder))), load_plugin("agents", "openclaw", None)
    for number, line in enumerate(progress.track(lines, description="recording")):
        found = exchange(
            f"turn_{number:020d}",
            line.body,
            line.reply,
            session=explicit_session(line.headers, line.body),
            prompt_ids=line.prompt_ids if tokens else None,
            completion_ids=line.completion_ids if tokens else (),
            logprobs=line.logprobs if tokens else (),
        )
        with store.recording() as recording:
            turn = record_exchange(recording, found, profile)
        assert turn.trainable == tokens, turn.untrainable
    store.close()
    return weigh(folder / "nextstate.sqlite3")


def weigh(file: Path) -> int:
    """The bytes of a database after its write-ahead log is moved into it."""
    db = sqlite3.connect(file)
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    return file.stat().st_size


def report(lines: Sequence[Line], kept: dict[str, int]) -> str:
    """The table, as Markdown."""
    raw = sum(line.raw_bytes for line in lines)
    with_tokens = raw + sum(line.token_bytes for line in lines)
    found = [
        f"{len(lines)} requests with their replies, {raw / 1e3:,.0f} kB of JSON; "
        f"with token ids and log-probs {with_tokens / 1e3:,.0f} kB. The goal: {_GOAL:.0%}.",
        "",
        "| | database, kB | of the raw JSON | of the JSON with tokens |",
        "|---|---|---|---|",
    ]
    for name, size in kept.items():
        found.append(
            f"| {name} | {size / 1e3:,.0f} | {size / raw:.1%} | {size / with_tokens:.1%} |"
        )
    return "\n".join(found)


def main() -> None:
    """Replays, weighs and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.storage",
        description="The size of recorded traffic in the store, as a part of its raw size.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("traffic", type=Path, help="recorded requests, .jsonl.gz")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="nextstate-storage-") as name,
        Progress(console=Console(stderr=True)) as progress,
    ):
        lines = read(options.traffic)
        kept = {"an empty store": replay((), Path(name) / "empty", tokens=False, progress=progress)}
        for title, tokens in (("without tokens", False), ("with tokens", True)):
            kept[title] = replay(lines, Path(name) / title, tokens=tokens, progress=progress)
        print(report(lines, kept))


if __name__ == "__main__":
    main()
