"""Makes finished exchanges as the relay hands them to the recorder, without engine or socket."""

from __future__ import annotations

import time
from collections.abc import Sequence

from nextstate.records import Json, Timings
from proxy.capture import Capture
from proxy.exchange import Exchange


def exchange(
    turn_id: str,
    request: Json,
    reply: Json,
    *,
    session: str | None = None,
    prompt_ids: Sequence[int] | None = None,
    completion_ids: Sequence[int] = (),
    logprobs: Sequence[float] = (),
    cut: bool = False,
) -> Exchange:
    """A request with the assistant message `reply`; a `cut` one has no reply."""
    capture = Capture()
    if not cut:
        entries = [{"logprob": logprob} for logprob in logprobs]
        choice = {"index": 0, "message": reply, "finish_reason": "stop", "stop_reason": None}
        tokens = {"logprobs": {"content": entries}, "token_ids": list(completion_ids)}
        counted = {"prompt_tokens": len(prompt_ids or ()), "completion_tokens": len(completion_ids)}
        capture.body(
            {
                "model": request["model"],
                "choices": [choice | tokens],
                "usage": counted,
                "prompt_token_ids": None if prompt_ids is None else list(prompt_ids),
            }
        )
    return Exchange(
        turn_id=turn_id,
        lineage="main",
        explicit_session=session,
        request=request,
        capture=capture,
        policy_version=0,
        timings=Timings(time.time(), None if cut else 0.05, 0.5),
        cut=cut,
        untrainable="the client left before the end" if cut else None,
    )
