"""The known agents: the marks of `agents.toml`, with the code for what marks cannot express."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import orjson

from nextstate.records import Json
from plugins.agents.envelopes import openclaw
from plugins.agents.envelopes.cline import words_in_result
from plugins.agents.envelopes.shape import Agent

_FILES, _FILES_END = "--- Content from referenced files ---", "--- End of content ---"
_GO_ON = ("Please continue.", "Continue from where you left off.")
_RAG = "### Task:\nRespond to the user query using the provided context"
_AGENT_ZERO = frozenset(("user_message", "user_intervention", "system_message", "attachments"))
_PICTURE_NOTES = re.compile(r"(?:\[Image: (?:source: |original \d)[^\]\n]{0,1000}\]\s*+)+")
_SETUP = ("# Context from my IDE setup:\n", "# Files mentioned by the user:\n")
_REQUEST = "\n## My request for Codex:"
_CRITERIA = "\nThis is the expected criteria for your final answer"
_HISTORY = ("<chat_history>", "### Chat History", "<prompt>")


def without_going_on(text: str) -> str | None:
    """None for the request to go on that Gemini CLI and its kin write.

    A person could use the same words, so it holds for these agents only.
    """
    return None if text.strip() in _GO_ON else text


def without_files(texts: Sequence[str]) -> Sequence[str]:
    """The texts of a message without the files that Gemini CLI and its kin put behind the words.

    Each file is a text of its own there, or all is one text.
    """
    if not any(_FILES in text for text in texts):
        return texts
    words, _, rest = "\n".join(texts).partition(_FILES)
    return words, rest.rpartition(_FILES_END)[2]


def is_open_webui_task(text: str) -> bool:
    """Whether Open WebUI asks for a title, tags, a query or the like, about the conversation."""
    if not text.startswith("### Task:") or text.startswith(_RAG):
        return False
    return "### Output" in text and any(mark in text for mark in _HISTORY)


def question_with_context(text: str) -> str | None:
    """A person's question behind the documents that Open WebUI found for it."""
    if not text.startswith(_RAG):
        return None
    question = text.rpartition("</context>")[2].strip()
    if question.startswith("<user_query>"):
        question = question.removeprefix("<user_query>").removesuffix("</user_query>").strip()
    return question


def words_beside_picture(text: str) -> str | None:
    """What stands behind Claude Code's notes of where a picture lies and how large it is.

    >>> words_beside_picture("[Image: source: /tmp/a.png]\\nno, the blue one")
    'no, the blue one'
    """
    note = _PICTURE_NOTES.match(text)
    return text[note.end() :] if note else None


def words_behind_setup(text: str) -> str | None:
    """A person's request behind what Codex tells of their editor and of files that they named.

    >>> words_behind_setup("# Context from my IDE setup:\\n\\n## My request for Codex:\\nno")
    'no'
    """
    if not text.startswith(_SETUP):
        return None
    return text.rpartition(_REQUEST)[2].strip() if _REQUEST in text else ""


def without_task(text: str) -> str | None:
    """No words for the task that CrewAI gives to an agent of a crew."""
    return "" if text.startswith("Current Task: ") and _CRITERIA in text else None


def words_in_json(text: str) -> str | None:
    """A person's words in the JSON object that Letta or Agent Zero makes of them.

    >>> words_in_json('{"type": "user_message", "message": "no, shorter", "time": "8:01"}')
    'no, shorter'
    """
    if text[:1] != "{":
        return None
    try:
        told = cast(Json, orjson.loads(text))
    except orjson.JSONDecodeError:
        return None
    if told.get("type") == "user_message":
        words = told.get("message")
    elif told.keys() <= _AGENT_ZERO:
        words = told.get("user_message") or told.get("user_intervention")
    else:
        return None
    return words.strip() or None if isinstance(words, str) else None


_CODE: Mapping[str, Mapping[str, Any]] = {
    "openclaw": {
        "is_side": openclaw.is_housekeeping,
        "read_own": openclaw.words_of,
        "session_name": openclaw.session_of,
    },
    "claude_code": {"read_own": without_going_on, "read_shared": words_beside_picture},
    "codex": {"read_shared": words_behind_setup},
    "qwen_code": {"read_own": without_going_on},
    "gemini_cli": {"read_own": without_going_on},
    "letta": {"read_shared": words_in_json},
    "crewai": {"read_shared": without_task},
    "cline": {"read_shared": words_in_result},
    "open_webui": {"is_side": is_open_webui_task, "read_shared": question_with_context},
}


def read_agents(file: Path) -> list[Agent]:
    """The agents of a table of marks, in its order."""
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    return [
        Agent(name, **{key: tuple(texts) for key, texts in marks.items()}, **_CODE.get(name, {}))
        for name, marks in tables.items()
    ]


AGENTS: Sequence[Agent] = read_agents(Path(__file__).with_name("agents.toml"))
OPENCLAW = next(agent for agent in AGENTS if agent.name == "openclaw")
