"""The OpenAPI description of the episodes' API describes what the proxy takes and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from nextstate.episodes import is_label
from nextstate.records import Json
from nextstate.store import Store
from proxy.episode_schema import CLOSE, EXAM, OPEN, OPEN_GROUP, REWARD, openapi
from tests.proxy.environment import TASK, Environment, call, refusal, user
from tests.proxy.running_proxy import Running, add_version, both
from tests.scripted_engine import ScriptedEngine

FOUND = openapi()


def errors(name: str, value: object) -> list[str]:
    schema = {"$ref": f"#/components/schemas/{name}", "components": FOUND["components"]}
    return [error.message for error in Draft202012Validator(schema).iter_errors(value)]


def test_the_proxy_serves_it_and_every_route_in_it(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        assert await environment.ask("GET", "episodes/openapi.json") == FOUND
        await environment.open("e-1")
        for path, methods in FOUND["paths"].items():
            url = p.url + path.format(episode="e-1")
            for method in ("get", "post"):
                answer = await p.http.request(method, url, data=b"[]")
                assert (answer.status == 405) == (method not in methods), (method, path)
        answer = await environment.open("openapi.json", 400)
        assert "this is the API's description" in refusal(answer)

    both(test, store, tmp_path)


def test_it_describes_every_answer(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        opened = await environment.open("e-1", max_calls=1, metadata={"row": 1})
        assert errors("Opened", opened) == []
        group = {**TASK, "group": "g", "group_size": 2}
        assert errors("Group", await environment.ask("POST", "groups", group)) == []
        assert errors("Episode", await environment.get("e-1")) == []
        await call(p, opened["base_url"], user("go"))
        reward = {"kind": "process", "value": 0.5, "index": 0}
        assert errors("Episode", await environment.reward("e-1", reward)) == []
        trace = await environment.ask("GET", "episodes/e-1/trace")
        assert (errors("Trace", trace), len(trace["turns"])) == ([], 1)
        _, refused = await call(p, opened["base_url"], user("go"), status=400)
        assert errors("Error", refused) == []
        assert errors("Episode", await environment.close("e-1", outcome=1)) == []
        assert errors("Error", await environment.ask("GET", "episodes/e-9", None, 404)) == []
        assert errors("Exam", await environment.ask("POST", "exams", {"tasks": 1})) == []
        add_version(store, tmp_path, 1)
        assert errors("Exam", await environment.ask("POST", "exams", {"tasks": 1})) == []

    both(test, store, tmp_path)


FIELDS = {
    "Open": OPEN, "OpenGroup": OPEN_GROUP, "Rewards": REWARD, "Close": CLOSE, "Hold": EXAM,
}  # fmt: skip
NEEDED: dict[str, Json] = {
    "Open": TASK,
    "OpenGroup": {**TASK, "group_size": 1},
    "Rewards": {"kind": "outcome", "value": 1},
    "Close": {"status": "done"},
    "Hold": {"tasks": 1},
}


@pytest.mark.parametrize("name", FIELDS)
def test_what_it_refuses_the_proxy_refuses(store: Store, tmp_path: Path, name: str) -> None:
    """One wrong value of each field at a time, and one field that nobody knows."""
    values = [*("a", "", " ", "x" * 101, "no such"), *(-1, 0, 2**31, 2**63, 0.5), True, [], {}]
    path = {
        "Open": "episodes", "OpenGroup": "groups", "Hold": "exams",
        "Rewards": "episodes/e-1/rewards", "Close": "episodes/e-1/close",
    }[name]  # fmt: skip

    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        await environment.open("e-1")
        refused = 0
        for field in (*FIELDS[name], "unknown"):
            for value in values:
                body: Any = {**NEEDED[name], field: value}
                body = [body] if name == "Rewards" else body
                if errors(name, body):
                    refused += 1
                    found = await environment.ask("POST", path, body, 400)
                    assert errors("Error", found) == []
        assert refused > len(FIELDS[name])

    both(test, store, tmp_path)


@given(st.text(max_size=101) | st.text("aZ0.~:+-_", max_size=101))
def test_a_name_is_one_for_the_description_if_it_is_one_for_us(name: str) -> None:
    # In Python's regex `$` also stands before a line feed, in JSON Schema's it does not.
    if not name.endswith("\n"):
        assert is_label(name) == (not errors("Open", {**TASK, "episode": name}))
