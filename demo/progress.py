"""What the proxy tells of the loop: the version that serves, and the store's counts."""

from __future__ import annotations

import aiohttp

from nextstate.prometheus import metric_values


async def serving_version(http: aiohttp.ClientSession) -> int:
    """The policy version that answers; 0 is the base."""
    async with http.get("/healthz") as answer:
        return int((await answer.json())["version"])


async def stored_counts(http: aiohttp.ClientSession) -> dict[str, int]:
    """The store's counts in the proxy's /metrics, by `record/state`."""
    async with http.get("/metrics") as answer:
        found = metric_values(await answer.text(), "nextstate_stored")
    return {f"{of['record']}/{of['state']}": int(value) for of, value in found}
