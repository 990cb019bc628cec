"""Logs and stored reasons say what went wrong and quote no conversation."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
import sqlalchemy as sa
from aiohttp import web
from aiohttp.test_utils import TestServer
from sqlalchemy.exc import SQLAlchemyError

from judge.config import JudgeConfig
from judge.stage import run
from nextstate.engine.client import EngineClient
from nextstate.error_text import safe_text
from nextstate.errors import EngineError, JudgeError
from nextstate.hooks import JudgeKind, JudgeSettings, load_plugin
from nextstate.store import Store
from plugins.judges.prompting import parse_vote
from proxy.capture import Capture
from tests.judge.test_model_judges import EVIDENCE
from tests.store.test_records import add, turn

SAID = "my pin is 4711"
"""What somebody said; a surrogate makes writing it fail with an error that holds all of it."""


def refusing(status: int, answer: Any) -> web.Application:
    async def refuse(_: web.Request) -> web.Response:
        return web.Response(status=status, body=orjson.dumps(answer))

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", refuse)
    return app


QUOTING = [
    {"error": {"message": f"cannot take {SAID!r}", "type": "BadRequestError", "code": 400}},
    {"object": "error", "message": f"no: {SAID}", "type": "BadRequestError", "param": SAID},
    {"detail": [{"loc": ["body", "messages"], "input": SAID, "type": "missing"}]},
    f"Internal error at {SAID}",
]


@pytest.mark.parametrize("status", [400, 413, 422, 500, 503])
@pytest.mark.parametrize("answer", QUOTING)
def test_a_refusal_of_a_conversation_is_not_quoted(status: int, answer: Any) -> None:
    async def scene() -> None:
        async with TestServer(refusing(status, answer)) as server:
            url = str(server.make_url("")).rstrip("/")
            messages = [{"role": "user", "content": SAID}]
            async with EngineClient(url, "base") as engine:
                for asked in (engine.tokenize(messages, None, {}), engine.count_tokens([], {})):
                    with pytest.raises(EngineError, match=f"answered {status}") as raised:
                        await asked
                    assert SAID not in str(raised.value)
            for kind, model in (("engine", "base"), ("litellm", "openai/base")):
                settings = JudgeSettings(model=model, base_url=f"{url}/v1", api_key="k")
                judge: JudgeKind = load_plugin("judges", kind, settings)
                with pytest.raises(JudgeError, match=str(status)) as refused:
                    await judge.vote(EVIDENCE, 1)
                assert SAID not in str(refused.value)
                await judge.close()

    asyncio.run(scene())


def test_a_refusal_before_a_conversation_is_read_is_quoted() -> None:
    async def scene() -> None:
        async with TestServer(refusing(404, {"error": {"message": "no model `base`"}})) as server:
            url = str(server.make_url("")).rstrip("/")
            async with EngineClient(url, "base") as engine:
                with pytest.raises(EngineError, match="no model `base`"):
                    await engine.tokenize([], None, {})

    asyncio.run(scene())


@pytest.mark.parametrize(
    "answer",
    [
        f"I will not say: {SAID}",
        f'{{"check": "{SAID}", "score": 1, "hint": null}}',
        f'{{"check": "abcde", "score": "{SAID}"}}',
    ],
)
def test_a_judges_answer_is_not_quoted(answer: str) -> None:
    with pytest.raises(JudgeError) as raised:
        parse_vote(answer, "abcde")
    assert SAID not in str(raised.value)


def test_the_reason_of_a_retried_turn_quotes_nobody(
    store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    """A plugin may raise whatever it likes."""

    class Broken:
        name = "broken"
        deterministic = True

        async def vote(self, evidence: Any, seed: int) -> Any:
            asyncio.get_running_loop().call_soon(stop.set)
            raise ValueError(f"cannot read {evidence.reply} or {SAID}")

        async def close(self) -> None: ...

    add(store, turn(1), next_state=SAID)
    stop = asyncio.Event()
    asyncio.run(run(store, JudgeConfig(), Broken(), None, stop))  # pyright: ignore[reportArgumentType]
    with store.database.read() as connection:
        reasons = connection.exec_driver_sql("SELECT reason FROM judgements").scalars().all()
    assert reasons == ["ValueError"]


def test_an_error_of_a_statement_does_not_show_its_values(store: Store) -> None:
    """SQLAlchemy's errors count as safe: the store hides what a statement was given."""
    statement = sa.text("INSERT INTO nowhere VALUES (:said)")
    with store.database.read() as connection, pytest.raises(SQLAlchemyError) as raised:
        connection.execute(statement, {"said": SAID})
    assert "nowhere" in safe_text(raised.value)
    assert SAID not in safe_text(raised.value)


RAISES = f"""
import asyncio, logging
from nextstate import logs
logs.to_stderr()
log = logging.getLogger("x")
said = "{SAID} \\ud800"
class Quoting(Exception): pass
def fails(kind):
    try:
        {{said: 1}}[kind]
    except KeyError as error:
        raise ValueError(said) from error
try:
    fails(said)
except ValueError:
    log.exception("a turn failed")
try:
    said.encode()
except UnicodeEncodeError as error:
    log.error("no text", exc_info=error)
try:
    open("/nowhere/at/all")
except OSError:
    log.exception("no file")
async def lost():
    async def dies(): raise Quoting(said)
    task = asyncio.create_task(dies())
    await asyncio.wait([task])
async def calls():
    def callback(text): raise Quoting(text)
    asyncio.get_running_loop().call_soon(callback, said)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
asyncio.run(lost())
asyncio.run(calls())
try:
    raise ExceptionGroup(said, [Quoting(said)])
except ExceptionGroup:
    raise LookupError(said)
"""


def test_a_traceback_shows_place_and_kind(tmp_path: Path) -> None:
    code = RAISES.replace("[kind]", "['another']")
    file = tmp_path / "raises.py"
    file.write_text(code)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
    assert done.returncode == 1
    assert SAID not in done.stderr
    kinds = ("KeyError", "ValueError", "UnicodeEncodeError", "Quoting", "LookupError")
    assert not [kind for kind in kinds if kind not in done.stderr]
    assert (
        "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/at/all'" in done.stderr
    )
    assert "in fails" in done.stderr
    assert "Task exception was never retrieved" in done.stderr
    assert "Exception in callback calls.<locals>.callback" in done.stderr


def test_an_engines_error_in_a_stream_is_named_and_not_quoted() -> None:
    for error in ({"message": SAID, "type": "BadRequestError", "code": 400}, SAID):
        capture = Capture()
        capture.body({"error": error})
        assert capture.error is not None
        assert SAID not in capture.error
