"""The managed vLLM's door: every route but `/health` asks for the key.

vLLM's own check covers `/v1` and leaves `/adapters`, `/invocations` and `/tokenize` open, so that
any program on the machine could load an adapter. This runs inside vLLM, as its `--middleware`.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"
"""vLLM reads its own key from here, too; a command line can be read by every user."""
_OPEN = frozenset(("/health",))
_REFUSAL = b'{"error":"Unauthorized"}'

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class KeyCheck:
    """An ASGI middleware; it does not start without a key."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._wanted = b"Bearer " + os.environ[KEY_VARIABLE].encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what is open or has the key."""
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
