"""A person's feedback as a verdict: there are no votes, and the hint is rendered like a judge's."""

from __future__ import annotations

from dataclasses import replace

from judge.hinting import Renderer, hinted_prompt
from judge.verdict import unmarked
from nextstate.records import FEEDBACK, Feedback, Turn, Verdict


async def feedback_verdict(feedback: Feedback, turn: Turn, engine: Renderer) -> Verdict:
    """The verdict that a person gave on `turn`, with the hinted prompt if the turn can train.

    Raises EngineError when the prompt could not be rendered.
    """
    verdict = Verdict(turn.id, (), feedback.score, FEEDBACK, feedback.hint)
    hint = None if feedback.hint is None else unmarked(feedback.hint)
    if hint is None or not turn.trainable:
        return verdict
    return replace(verdict, hinted_prompt_ids=await hinted_prompt(turn, hint, engine))
