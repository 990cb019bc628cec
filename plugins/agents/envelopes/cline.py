"""A person's words in a tool's result, which Cline and Roo Code write into the user role."""

from __future__ import annotations

import re

_RESULT = re.compile(r"\A\[(\w{1,60})[^\n]{0,2000}\] Result:[ \t]*\n?")
_SAID = re.compile(
    r"\s{0,20}(?P<lead>The user [^\n<]{0,200}\n\s{0,20})?<(?P<tag>feedback|answer|user_message)>"
)
_READS = ("read", "fetch", "search", "list", "browser", "mcp", "execute", "command")
"""Tools whose result others wrote: it never counts as a person's words."""


def words_in_result(text: str) -> str | None:
    """The person's words in the result of a tool that asks a question or for consent.

    >>> words_in_result("[attempt_completion] Result:\\n\\n<feedback>\\nno, shorter\\n</feedback>")
    'no, shorter'
    """
    result = _RESULT.match(text)
    found = _SAID.match(text, result.end()) if result else None
    if result is None or found is None or any(name in result[1] for name in _READS):
        return None
    asks = result[1].startswith(("ask_", "attempt_", "plan_", "new_", "condense"))
    closing = text.find(f"</{found['tag']}>", found.end())
    if closing < 0 or not (asks or found["lead"]):
        return None
    return text[found.end() : closing].strip() or None
