"""The bodies of the episodes' API: which fields each has, and their description in OpenAPI 3.1.

`GET /v1/episodes/openapi.json` answers with `openapi()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from nextstate.episodes import (
    LABEL,
    LEFT_OUT,
    MAX_TASK_CHARS,
    MOST_REWARDS,
    SAMPLER,
    EpisodeState,
    EpisodeStatus,
    RewardKind,
    Split,
)
from nextstate.records import Json
from proxy.paths import EPISODES, EXAMS, GROUPS

DESCRIPTION = "openapi.json"
"""The last part of the description's own path. No episode has this name."""
MOST_IN_GROUP, MOST_METADATA_BYTES, MOST_OBSERVATION = 1024, 64 << 10, 1 << 20
MOST_EXAM_TASKS = 1000
KINDS: Mapping[str, type | tuple[type, ...]] = {
    "text": str,
    "whole number": int,
    "number": (int, float),
    "object": dict,
}
_TYPES = {"text": "string", "whole number": "integer", "number": "number", "object": "object"}


class Field(NamedTuple):
    """One field of a body."""

    kind: str
    """One of KINDS."""
    means: str
    limits: Mapping[str, object] = {}
    """More of its JSON Schema."""


_LABEL: Mapping[str, object] = {"pattern": LABEL}
_BUDGET: Mapping[str, object] = {"exclusiveMinimum": 0, "exclusiveMaximum": 1 << 31}
OPEN: Mapping[str, Field] = {
    "episode": Field("text", "An id of your choice. Opened again, it is the same one.", _LABEL),
    "environment": Field("text", "The environment's name.", _LABEL),
    "task": Field(
        "text", "What it asks for, or an id.", {"minLength": 1, "maxLength": MAX_TASK_CHARS}
    ),
    "group": Field("text", "The group of episodes that it is compared in.", _LABEL),
    "group_size": Field(
        "whole number",
        "How many scorable episodes the group has.",
        {"minimum": 1, "maximum": MOST_IN_GROUP},
    ),
    "split": Field("text", "`eval`: its turns never train.", {"enum": [*Split]}),
    "lineage": Field("text", "Which lineage its turns train; by default your key's own."),
    "seed": Field(
        "whole number", "Kept for you.", {"minimum": -(1 << 63), "exclusiveMaximum": 1 << 63}
    ),
    "max_calls": Field("whole number", "Calls of the model that it may begin.", _BUDGET),
    "max_tokens": Field("whole number", "Tokens of all its replies together.", _BUDGET),
    "deadline_s": Field("number", "Seconds after its opening at which its calls end.", _BUDGET),
    "version": Field(
        "whole number",
        "The policy version that serves it; by default the one that serves its lineage.",
        {"minimum": 0},
    ),
    "sampling": Field(
        "object",
        "Sampling settings that take the place of the agent's; null: the agent's is left out.",
        {
            "properties": {
                name: {"type": ["number", "null"], "minimum": least, "maximum": most}
                for name, (least, most) in SAMPLER.items()
            }
            | {name: {"type": "null"} for name in LEFT_OUT if name not in SAMPLER},
            "additionalProperties": False,
        },
    ),
    "metadata": Field("object", f"Kept for you; at most {MOST_METADATA_BYTES} bytes of JSON."),
}
OPEN_GROUP = {name: field for name, field in OPEN.items() if name != "episode"}
REWARD: Mapping[str, Field] = {
    "kind": Field("text", "What it is about: the episode, or a step.", {"enum": [*RewardKind]}),
    "name": Field("text", "The last word counts for each name and step; by default the kind."),
    "value": Field("number", "Any finite number."),
    "index": Field(
        "whole number", "The step of a process reward: the number of a recorded turn, from 0."
    ),
    "turn": Field("text", "The step by its turn's id, as x-nextstate-turn, instead of `index`."),
    "source": Field("text", "Who gives it.", _LABEL),
}
CLOSE: Mapping[str, Field] = {
    "status": Field("text", "How it ended.", {"enum": [*EpisodeStatus]}),
    "outcome": Field("number", "How well; 1 is solved. By default what its outcome rewards say."),
    "observation": Field(
        "text",
        "What the environment showed last: the last turn's next state. The first close counts.",
        {"maxLength": MOST_OBSERVATION},
    ),
}
EXAM: Mapping[str, Field] = {
    "tasks": Field(
        "whole number",
        "How many held-out tasks an exam has.",
        {"minimum": 1, "maximum": MOST_EXAM_TASKS},
    ),
    "lineage": OPEN["lineage"]._replace(means="Whose candidates; by default your key's lineage."),
    "holder": Field("text", "Tells you from others who might hold them.", _LABEL),
}
_NEEDED = {"environment", "task"}
_ERRORS = {
    "400": "A wrong body; the type EpisodeBudgetError for a call over the episode's budget.",
    "401": "A wrong or missing key.",
    "403": "An episode's key, which only calls the model, or a page of another site.",
    "404": "No such episode, or none that the key may see.",
    "409": "It stands for something else, or is closed: the type ConflictError.",
    "413": "The body is too large.",
    "415": "The body is not application/json.",
    "503": "The store cannot be used now: try again.",
}


def openapi() -> Json:
    """The description of all routes."""
    one = [_parameter("episode")]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Episodes of environments", "version": "1"},
        "paths": {
            EPISODES: {"post": _operation("Opens an episode.", "Open", "Opened")},
            GROUPS: {"post": _operation("Opens a group, or nothing.", "OpenGroup", "Group")},
            EXAMS: {
                "post": _operation("Holds exams for a minute; the one that is due.", "Hold", "Exam")
            },
            f"{EPISODES}/{{episode}}": {
                "parameters": one,
                "get": _operation("An episode with its rewards and turns.", None, "Episode"),
            },
            f"{EPISODES}/{{episode}}/rewards": {
                "parameters": one,
                "post": _operation("Keeps rewards, all or none.", "Rewards", "Episode"),
            },
            f"{EPISODES}/{{episode}}/close": {
                "parameters": one,
                "post": _operation("Ends an episode.", "Close", "Episode"),
            },
            f"{EPISODES}/{{episode}}/trace": {
                "parameters": one,
                "get": _operation("Its turns with their tokens.", None, "Trace"),
            },
        },
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _schemas() -> Json:
    opened: Json = {
        "episode": {"type": "string"},
        "state": {"enum": [*EpisodeState]},
        "version": {"type": "integer", "description": "What serves its next call."},
        "base_url": {"type": "string", "description": "For its agent; it ends with /v1."},
        "api_key": {"type": "string", "description": "For its agent: it only calls the model."},
    }
    kept = {name: _known(field) for name, field in OPEN.items() if name != "group_size"}
    number, text = {"type": ["number", "null"]}, {"type": ["string", "null"]}
    version: Json = {"type": ["integer", "null"]}
    count, texts = {"type": "integer"}, {"type": "array", "items": {"type": "string"}}
    reward = {"episode": {"type": "string"}, **{n: _known(f) for n, f in REWARD.items()}}
    episode: Json = {
        **kept,
        "state": opened["state"],
        "status": {"enum": [*EpisodeStatus, None]},
        **dict.fromkeys(("outcome", "opened_at", "closed_at"), number),
        **dict.fromkeys(("version_min", "version_max"), number),
        **{"calls": count, "tokens": count, "reason": text, "turns": texts},
        "rewards": {"type": "array", "items": _object(reward)},
    }
    ids, logps = {"type": "array", "items": count}, {"type": "array", "items": {"type": "number"}}
    traced: Json = {
        **{"node_id": {"type": "string"}, "prompt_token_ids": ids, "completion_token_ids": ids},
        **{"per_token_logps": logps, "loss_mask": ids, "metadata": {"type": "object"}},
    }
    exam: Json = {
        "lineage": {"type": "string"},
        "candidate": {**version, "description": "It waits for its exam; null: none does."},
        "parent": {**version, "description": "What it is compared with."},
        "planned": count,
        "tasks": {**count, "description": "That both have played."},
        **dict.fromkeys(("solved", "gained", "lost"), count),
    }
    error: Json = {
        **{"message": {"type": "string"}, "type": {"type": "string"}},
        **{"param": {"type": "null"}, "code": count},
    }
    trace = {"schema_version": {"const": 1}, "turns": {"type": "array", "items": _object(traced)}}
    of_group = {"type": "array", "items": _ref("Opened")}
    return {
        "Open": _body(OPEN, _NEEDED),
        "OpenGroup": _body(OPEN_GROUP, {*_NEEDED, "group_size"}),
        "Rewards": {
            **{"type": "array", "maxItems": MOST_REWARDS},
            "items": _body(REWARD, {"kind", "value"}),
        },
        "Close": _body(CLOSE, {"status"}),
        "Hold": _body(EXAM, {"tasks"}),
        "Opened": _object(opened),
        "Group": _object({"group": {"type": "string"}, "episodes": of_group}),
        "Episode": _object(episode),
        "Exam": _object(exam),
        "Trace": _object(trace),
        "Error": _object({"error": _object(error)}),
    }


def _operation(summary: str, body: str | None, answer: str) -> Json:
    errors = {
        status: {"description": text, "content": _json(_ref("Error"))}
        for status, text in _ERRORS.items()
    }
    found: Json = {
        "summary": summary,
        "responses": {"200": {"description": answer, "content": _json(_ref(answer))}, **errors},
    }
    if body is not None:
        found["requestBody"] = {"required": True, "content": _json(_ref(body))}
    return found


def _parameter(name: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", **_LABEL}}


def _body(fields: Mapping[str, Field], needed: Iterable[str]) -> Json:
    """A body may leave out the other fields, or set them to null."""
    properties: Json = {name: _known(field) for name, field in fields.items()}
    for name in needed:
        properties[name]["type"] = _TYPES[fields[name].kind]
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(needed),
        "additionalProperties": False,
    }


def _known(field: Field) -> Json:
    """The JSON Schema of a field's values."""
    limits = dict(field.limits)
    if isinstance(choices := limits.get("enum"), list):
        limits["enum"] = [*choices, None]
    return {"type": [_TYPES[field.kind], "null"], "description": field.means, **limits}


def _object(properties: Json) -> Json:
    """An answer, which has all of its fields."""
    return {"type": "object", "properties": properties, "required": [*properties]}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
