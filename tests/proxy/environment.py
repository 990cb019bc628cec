"""An environment beside a running proxy: it opens episodes and calls the model in them."""

from __future__ import annotations

from typing import Any

from tests.proxy.running_proxy import Running
from tests.scripted_engine import MODEL

TASK = {"environment": "shell", "task": "find the file with the word"}


class Environment:
    """Sends requests about one proxy's episodes."""

    def __init__(self, p: Running, key: str | None = None) -> None:
        self.p = p
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    async def ask(
        self, method: str, path: str, body: object = None, status: int = 200
    ) -> dict[str, Any]:
        """The JSON of an answer, which must have the status."""
        sent = {"data": body} if isinstance(body, bytes) else {"json": body}
        url = f"{self.p.url}/v1/{path}"
        answer = await self.p.http.request(method, url, headers=self.headers, **sent)
        found = await answer.json()
        assert answer.status == status, found
        return found

    async def open(self, name: str, status: int = 200, **more: Any) -> dict[str, Any]:
        body = {"episode": name, **TASK, **more}
        return await self.ask("POST", "episodes", body, status)

    async def reward(self, name: str, *rewards: dict[str, Any]) -> dict[str, Any]:
        return await self.ask("POST", f"episodes/{name}/rewards", list(rewards))

    async def end(
        self, name: str, http_status: int, status: str = "done", **body: Any
    ) -> dict[str, Any]:
        body = {"status": status, **body}
        return await self.ask("POST", f"episodes/{name}/close", body, http_status)

    async def close(self, name: str, **body: Any) -> dict[str, Any]:
        return await self.end(name, 200, **body)

    async def get(self, name: str) -> dict[str, Any]:
        return await self.ask("GET", f"episodes/{name}")


def refusal(answer: dict[str, Any]) -> str:
    """The message of an error in the API's format."""
    return answer["error"]["message"]


async def call(
    p: Running,
    base_url: str,
    *messages: dict[str, Any],
    key: str = "unused",
    status: int = 200,
    headers: dict[str, str] | None = None,
    **more: Any,
) -> tuple[str, dict[str, Any]]:
    """(turn id, the reply's JSON) of one call of the model under a base URL."""
    body = {"model": MODEL, "messages": messages, **more}
    sent = {"Authorization": f"Bearer {key}", **(headers or {})}
    answer = await p.http.post(f"{base_url}/chat/completions", json=body, headers=sent)
    found = await answer.json()
    assert answer.status == status, found
    return answer.headers.get("x-nextstate-turn", ""), found


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}
