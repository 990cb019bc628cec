"""What a schema's `pattern` costs vLLM's compiler, at the bounds of proxy/schemas.py and beyond.

python -m benchmarks.patterns
"""

from __future__ import annotations

import json
import os
import resource
import time
from typing import Any

from proxy.schemas import excess

MOST_S = 12
SCHEMAS = {
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


def main() -> None:
    """Prints the table, with a vocabulary of 258 tokens."""
    import xgrammar

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
    main()
