"""What a schema's `pattern` costs vLLM's compiler, at the bounds of proxy/schemas.py and beyond.

python -m benchmarks.patterns [TOKENIZER.json]
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

from proxy.schemas import excess

MOST_S = 12
IPV6 = (
    "("
    + "|".join(f"([0-9a-f]{{1,4}}:){{1,{7 - n}}}(:[0-9a-f]{{1,4}}){{1,{n}}}" for n in range(1, 7))
    + ")"
)
SCHEMAS = {
    "ten lines of 200": [r"^(- [^\n]{1,200}\n){1,10}$"],
    "one line of 200": [r"^[^\n]{1,200}\n$"],
    "eight IPv6 addresses": [IPV6] * 8,
    "`.{1,50}: .{1,50}`": [".{1,50}: .{1,50}"],
    "`[a-z]{1,50}[ -]?[a-z]{0,50}`": ["[a-z]{1,50}[ -]?[a-z]{0,50}"],
    "`(a{100}b){190}`": ["(a{100}b){190}"],
    "`[a-z]?` 40 times": ["[a-z]?" * 40],
    r"`\d?` 150 times": [r"\d?" * 150],
    "`.?` 20 times": [".?" * 20],
    "`.?` 40 times": [".?" * 40],
    "`(.{0,9})` 5 times": ["(.{0,9})" * 5],
    "`( .{0,20})?` 20 times": ["( .{0,20})?" * 20],
    "`.{1,999}`": [".{1,999}"],
    "`.{1,999}` twice": [".{1,999}" * 2],
    "`.{1,999}` three times": [".{1,999}" * 3],
    "`.{1,999}` in two patterns": [".{1,999}"] * 2,
    "`.{1,2000}`": [".{1,2000}"],
    "`a{999}` 100 times": ["a{999}" * 100],
    "`.?` 150 times": [".?" * 150],
    "`.?` 150 times in four patterns": [".?" * 150] * 4,
    "`.?` 400 times": [".?" * 400],
    "`.?` 1000 times": [".?" * 1000],
    "`((.?){10}){100}`": ["((.?){10}){100}"],
    "`(.{0,9})` 100 times": ["(.{0,9})" * 100],
    "`(.{0,9})` 200 times": ["(.{0,9})" * 200],
    "150 UUIDs": ["^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"] * 150,
}


def schema_of(patterns: list[str]) -> dict[str, object]:
    """An object with one property for each pattern."""
    named = {f"p{n}": {"type": "string", "pattern": one} for n, one in enumerate(patterns)}
    return {"type": "object", "properties": named}


def seconds_of(schema: dict[str, object], compiler: Any) -> str:
    """The CPU seconds of a compilation in a process of its own, which ends after MOST_S."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_S, MOST_S))
        begun = time.process_time()
        compiler.compile_json_schema(json.dumps(schema))
        os.write(writing, f"{time.process_time() - begun:.2f}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        told = answer.read()
    os.waitpid(child, 0)
    return told or f"over {MOST_S}"


def main(tokenizer: str = "") -> None:
    """Prints the table, with a vocabulary of 258 tokens or a model's own."""
    import xgrammar

    if tokenizer:
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(tokenizer).get_vocab()
        model = sorted(ids, key=ids.__getitem__)
        kind = xgrammar.VocabType.BYTE_LEVEL
        tokens = xgrammar.TokenizerInfo(model, vocab_type=kind, stop_token_ids=[0])
    else:
        vocabulary = [bytes([byte]) for byte in range(256)] + [b"ab", b"aa"]
        tokens = xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[0])
    compiler = xgrammar.GrammarCompiler(tokens, max_threads=1, cache_enabled=False)
    print("| patterns | CPU s | the proxy |\n|---|---|---|")
    for name, patterns in SCHEMAS.items():
        schema = schema_of(patterns)
        refused = excess({"response_format": {"json_schema": {"schema": schema}}})
        told = "refuses" if refused else "passes"
        print(f"| {name} | {seconds_of(schema, compiler)} | {told} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:2])
