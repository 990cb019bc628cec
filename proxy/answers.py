"""The proxy's own errors, in the format of the API that was asked."""

from __future__ import annotations

from aiohttp import web

from nextstate.records import Json
from proxy.serving import MESSAGES

RETRY_AFTER_S = 10
_KINDS = {  # as vLLM and the official clients name them
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


class Refused(Exception):
    """Ends a request: the client gets this status and message."""

    def __init__(
        self, status: int, message: str, kind: str | None = None, wait_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.wait_s = wait_s
        """When to try again; None: not said, or after a time that suits a 503."""
        self.kind = kind
        """The error's type, if it is not the one of all errors of this status."""


def error_response(
    path: str, status: int, message: str, kind: str | None = None, wait_s: int | None = None
) -> web.Response:
    """An error in the format of the API at `path`. A 503 says when to try again."""
    default = "BadRequestError" if status < 500 else "InternalServerError"
    kind = kind or _KINDS.get(status, default)
    body: Json = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    if path.startswith(MESSAGES):
        body = {"type": "error", "error": {"type": kind, "message": message}}
    if wait_s is None and status == 503:
        wait_s = RETRY_AFTER_S
    headers = None if wait_s is None else {"Retry-After": str(wait_s)}
    return web.json_response(body, status=status, headers=headers)
