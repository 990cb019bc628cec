"""Makes a managed vLLM check its key on every route but `/health`.

vLLM's own check covers `/v1` only. Through `/adapters`, `/invocations` and `/tokenize` any program
on the machine could load an adapter. This runs inside vLLM, as its `--middleware`.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"
"""vLLM reads its own key from here too. Every user of the machine can read a command line."""
_OPEN = frozenset(("/health",))
_REFUSAL = b'{"error":"Unauthorized"}'

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class KeyCheck:
    """An ASGI middleware. It raises KeyError at the start if there is no key."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._wanted = b"Bearer " + os.environ[KEY_VARIABLE].encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on requests with the key and those to open routes."""
        if scope["type"] == "lifespan" or self._may_pass(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSAL})

    def _may_pass(self, scope: Scope) -> bool:
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        return scope["path"] in _OPEN or (
            len(sent) == 1 and hmac.compare_digest(sent[0], self._wanted)
        )
