"""Episodes as `nextstate episodes` and `nextstate status` show them: as JSON rows and as text."""

from __future__ import annotations

from dataclasses import asdict

from rich.cells import cell_len

from judge.advantages import compared, judge_auc, process_weight
from judge.groups import judged
from nextstate.app.terminal import fitted
from nextstate.episodes import Episode, Split
from nextstate.records import Json
from nextstate.store import Store
from nextstate.wire import one_line

_UNKNOWN = "·"
_SHOWN_CHARS = 60
_NAME_CELLS, _REASON_CELLS = 16, 32
_MARK = "  ✗ "
_SHOWN_RATE = 200
"""The success rate is that of so many of the newest settled episodes."""


def episode_row(episode: Episode) -> Json:
    """One object of `nextstate episodes --json`: what `GET /v1/episodes/ID` answers with."""
    found: Json = {"episode": episode.id, **asdict(episode)}
    del found["id"]
    return found


def episode_details(store: Store, episode: Episode) -> Json:
    """The same with its rewards, and with each step's verdict and what became of it."""
    samples = store.groups.advantages(episode.id)
    steps: list[Json] = []
    for turn_id in store.episodes.turn_ids(episode.id):
        turn = store.turns.get(turn_id)
        if turn is None:
            continue
        verdict = store.judging.verdict(turn_id)
        state, advantage, reason = samples.get(turn_id, (None, None, turn.untrainable))
        steps.append(
            {
                "step": turn.step,
                "turn": turn.id,
                "kind": turn.kind,
                "version": turn.policy_version,
                "next_state": [state.text for state in store.turns.next_states(turn_id)],
                "votes": verdict and verdict.votes,
                "score": verdict and verdict.score,
                "state": state,
                "advantage": advantage,
                "reason": reason,
            }
        )
    rewards = [asdict(reward) for reward in store.episodes.rewards(episode.id)]
    return {**episode_row(episode), "rewards": rewards, "steps": steps}


def episode_line(episode: Episode, width: int) -> str:
    """One line: id, environment, state, outcome, calls, versions, task, and `✗` if it was dropped.

    At most `width` cells wide, unless the id and what follows it take more: an id is never cut.
    """
    split = " eval" if episode.split is Split.EVAL else ""
    outcome = "" if episode.outcome is None else f" {episode.outcome:g}"
    calls = f"{episode.calls} call{'' if episode.calls == 1 else 's'}"
    start = (
        f"{episode.id}  {fitted(episode.environment, _NAME_CELLS)}{split}  "
        f"{episode.state}{outcome}  {calls}  {versions_text(episode)}  "
    )
    room, end = width - cell_len(start), ""
    if episode.reason is not None:
        end = f"{_MARK}{fitted(episode.reason, min(max(room - len(_MARK), 8), _REASON_CELLS))}"
    room -= cell_len(end)
    return f"{start}{fitted(episode.task, room) if room > 1 else ''}{end}".rstrip()


def episode_card(found: Json) -> str:
    """`episode_details` as text: the episode, its rewards, and a line for each step."""
    shown = ("environment", "task", "group", "split", "lineage", "state", "status", "outcome")
    more = ("calls", "tokens", "max_calls", "max_tokens", "deadline_s", "version", "reason")
    lines = [f"episode {found['episode']}"]
    for name in (*shown, *more):
        if found[name] is not None:
            lines.append(f"{name:12} {one_line(str(found[name])[:400])}")
    for reward in found["rewards"]:
        about = reward["turn"] or "the episode"
        source = f" by {reward['source']}" if reward["source"] else ""
        name = f"{reward['kind']} {reward['name']}"
        lines.append(f"reward       {name} = {reward['value']:g} of {about}{source}")
    lines.append(f"steps        {len(found['steps'])}")
    for step in found["steps"]:
        score = f"{step['score']:+d}" if step["score"] is not None else f" {_UNKNOWN}"
        worth = step["reason"] or step["state"] or "not judged yet"
        if step["advantage"] is not None:
            worth = f"{worth}, advantage {step['advantage']:+.2f}"
        told = one_line(" | ".join(step["next_state"])[:_SHOWN_CHARS])
        lines.append(f"  {step['step']:3}  {step['turn']}  {score}  {worth}  {told}".rstrip())
    return "\n".join(lines)


def settled_worth(store: Store) -> Json:
    """By lineage and environment: how often episodes succeed, and whether the judge predicts it.

    `judge_auc` is None where no group has both different outcomes and judged steps. With
    `process_weight` 0 the steps learn from outcomes alone.
    """
    found: Json = {}
    for lineage, environment in store.groups.environments():
        episodes = store.groups.earlier(lineage, environment)
        newest, opinions = episodes[-_SHOWN_RATE:], judged(episodes)
        auc = judge_auc(compared(opinions))
        found[f"{lineage}/{environment}"] = {
            "episodes": len(newest),
            "solved": sum(episode.outcome >= 1.0 for episode in newest),
            "judge_auc": None if auc is None else round(auc, 4),
            "process_weight": process_weight(opinions),
        }
    return found


def settled_text(found: Json) -> str:
    """One entry of `settled_worth` in plain words.

    >>> settled_text({"episodes": 8, "solved": 6, "judge_auc": 0.52, "process_weight": 0.0})
    '6 of the last 8 solved; the judge predicts outcomes with AUC 0.52, too little: it is ignored'
    """
    text = f"{found['solved']} of the last {found['episodes']} solved; "
    if found["judge_auc"] is None:
        return f"{text}nothing to tell whether the judge predicts outcomes"
    text += f"the judge predicts outcomes with AUC {found['judge_auc']:.2f}"
    return text if found["process_weight"] else f"{text}, too little: it is ignored"


def versions_text(episode: Episode) -> str:
    """The policy versions that served it; in brackets the one that shall."""
    low, high = episode.version_min, episode.version_max
    if low is None:
        return _UNKNOWN if episode.version is None else f"(v{episode.version})"
    return f"v{low}" if low == high else f"v{low} to v{high}"
