"""Taking the data out: a page that says what would leave, and the download of it.

The command runs in a process of its own and its output is passed on piece by piece: nothing is
written to a disk here, and a browser that reads slowly holds neither the proxy nor the store.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import sys
from collections.abc import Mapping

from aiohttp import web

from nextstate.app.page.visits import Visit
from nextstate.app.settings import Settings
from nextstate.errors import EXIT_LATER
from nextstate.records import Json
from nextstate.store import Store
from proxy.answers import Refused

log = logging.getLogger(__name__)

WHAT = {
    "sft": "praised turns as conversations",
    "kto": "praised and blamed turns",
    "dpo": "a praised reply beside a blamed one",
    "prompts": "each different request once",
    "traces": "token ids, log-probs and masks",
    "turns": "whole turns with verdicts and feedback",
}
_FORMS = {"jsonl": "JSON lines", "parquet": "Parquet"}
_TYPES = {"jsonl": "application/x-ndjson", "parquet": "application/vnd.apache.parquet"}
MOST_DOWNLOADS = 2
"""At once, of one process of the proxy: each reads the whole store."""
STALLED_S = 120.0
"""A browser that takes nothing for so long is given up."""
_PIECE_BYTES = 1 << 16


def shown(
    settings: Settings, store: Store, lineage: str, what: str | None, form: str | None
) -> Json:
    """What the page for the export shows; with `what` the command too. Raises Refused."""
    _check(what, form or "jsonl")
    found = None
    if what is not None:
        words = _words(settings, lineage, what, f"{what}.{form or 'jsonl'}")
        found = shlex.join(["nextstate", *words, *["--in-clear"] * (store.vault is not None)])
    return {
        "lineage": lineage,
        "kinds": WHAT,
        "forms": _FORMS,
        "what": what or "sft",
        "form": form or "jsonl",
        "command": found,
        "encrypted": store.vault is not None,
    }


class Downloads:
    """The exports that are on their way from one process of the proxy."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._running = 0

    async def send(
        self, request: web.Request, visit: Visit, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        """Answers the page's form with the file. Raises Refused."""
        lineage = visit.seen(visit.form.get("lineage", ""))
        what, form = visit.form.get("what", ""), visit.form.get("form", "")
        _check(what, form)
        words = _words(self._settings, lineage, what, "-")
        if form == "parquet":
            words.append("--parquet")
        if self._store.vault is not None:
            if visit.form.get("in_clear") != "yes":
                raise Refused(400, "The store is encrypted: say that the file may be in clear.")
            words.append("--in-clear")
        if self._running >= MOST_DOWNLOADS:
            raise Refused(503, f"{MOST_DOWNLOADS} exports are under way: try again after them.")
        self._running += 1
        try:
            name = f"{lineage}-{what}.{form}"
            return await _send(request, words, name, headers)
        finally:
            self._running -= 1


async def _send(
    request: web.Request, words: list[str], name: str, headers: Mapping[str, str]
) -> web.StreamResponse:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "nextstate", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    failed = asyncio.create_task(process.stderr.read())
    try:
        piece = await process.stdout.read(_PIECE_BYTES)
        if not piece:
            lines = (await failed).decode(errors="replace").strip().splitlines()
            status = 503 if await process.wait() == EXIT_LATER else 409
            raise Refused(status, lines[-1] if lines else "The command ended without a word.")
        kind = _TYPES[name.rpartition(".")[2]]
        response = web.StreamResponse(headers={**headers, "Content-Type": kind})
        response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
        await response.prepare(request)
        trouble = await _pass_on(piece, process, process.stdout, response)
    finally:
        if process.returncode is None:
            process.kill()
        await asyncio.gather(process.stdout.read(), failed)  # it ends only once its pipes are empty
        await process.wait()
    if trouble is not None:
        log.warning("an export broke off: %s", trouble)
        # The browser must not take a part for the whole. It ends this request too: it comes last.
        if request.transport is not None:
            request.transport.abort()
    return response


async def _pass_on(
    piece: bytes,
    process: asyncio.subprocess.Process,
    source: asyncio.StreamReader,
    response: web.StreamResponse,
) -> str | None:
    """Sends what the command prints to its end; returns why it is not all."""
    try:
        while piece:
            await asyncio.wait_for(response.write(piece), STALLED_S)
            piece = await source.read(_PIECE_BYTES)
    except TimeoutError:
        return f"nobody took it for {STALLED_S:g} seconds"
    except ConnectionError:
        return "the browser left"
    code = await process.wait()
    return None if code == 0 else f"`nextstate export` ended with status {code}"


def _check(what: str | None, form: str) -> None:
    """Raises Refused unless there is such an export."""
    if what is not None and what not in WHAT:
        raise Refused(400, f"what = {what[:40]!r}: expected one of {', '.join(WHAT)}.")
    if form not in _FORMS:
        raise Refused(400, f"form = {form[:40]!r}: expected one of {', '.join(_FORMS)}.")
    if what == "turns" and form != "jsonl":
        raise Refused(400, "Whole turns are written as JSON lines only.")


def _words(settings: Settings, lineage: str, what: str, out: str) -> list[str]:
    words = ["export", what, "--out", out, "--lineage", lineage]
    if settings.file.exists():
        words += ["--config", str(settings.file.absolute())]
    return words
