"""The tools of a Responses request as the model sees them, and its calls as the client does.

As in vLLM, a function in a namespace is called `<namespace>__<name>`, a custom tool is a function
with one text, and tools that only OpenAI's own servers have are not shown. vLLM refuses custom
tools with a grammar; here the description contains the grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from nextstate.records import Json
from nextstate.wire import obj, objects

_INPUT = "input"
_PARAMETERS: Json = {
    "type": "object",
    "properties": {
        _INPUT: {"type": "string", "description": "The freeform text payload for this tool."}
    },
    "required": [_INPUT],
    "additionalProperties": False,
}
"""The parameters that vLLM shows for a custom tool."""
_FIELDS = ("name", "description", "parameters", "strict", "defer_loading")
_UNSHOWN = re.compile(
    "web_search(_2025_08_26)?|file_search|computer(_use_preview)?|image_generation|local_shell|"
    "shell|apply_patch|tool_search|programmatic_tool_calling"
)
"""Types of tools that vLLM accepts and shows to no model."""
_OPENING = re.compile(r'\A\s*\{\s*"input"\s*:\s*"')
_TEXT = re.compile(r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*')
_HALF = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")
"""Half of a surrogate pair, whose other half is still to come."""


def is_shown(tool: Json) -> bool:
    """Whether the model sees the tool, or the tools in its namespace."""
    return not _UNSHOWN.fullmatch(str(tool.get("type")))


def chat_tools(tools: list[Json]) -> Iterator[Json]:
    """The functions that the model sees, in chat form. The tools must have no `problem`."""
    for tool in tools:
        if tool.get("type") == "function":
            yield _function(tool, tool.get("name"))
        elif tool.get("type") == "custom":
            shown = {"description": _described(tool), "parameters": _PARAMETERS}
            yield _function(shown, tool.get("name"))
        elif tool.get("type") == "namespace":
            for inner in objects(tool.get("tools")):
                if inner.get("type") == "function":
                    yield _function(inner, flat_name(tool.get("name"), inner.get("name")))


def problem(tool: Json) -> str | None:
    """Why the tool cannot be shown as vLLM shows it, or None."""
    kind, inner = tool.get("type"), objects(tool.get("tools"))
    if not is_shown(tool):
        return None
    if kind not in ("function", "custom", "namespace"):
        return f"has a tool of type {str(kind)[:40]}, whose own text a server would add"
    for one in (tool, *inner):
        fine = isinstance(one.get("name"), str)
        fine = fine and isinstance(one.get("description"), str | None)
        fine = fine and isinstance(one.get("parameters"), dict | None)
        fine = fine and isinstance(one.get("strict"), bool | None)
        fine = fine and isinstance(one.get("defer_loading"), bool | None)
        if not fine:
            return "has a malformed tool"
    if kind == "namespace" and (inner != tool.get("tools") or not inner):
        return "has a malformed namespace"
    return None


def flat_name(namespace: object, name: object) -> str:
    """The model's name for a function in a namespace."""
    return f"{namespace}__{name}"


def chosen_name(name: object, tools: list[Json]) -> object:
    """The model's name for the tool that `tool_choice` names; None if there is none, or several."""
    known = [tool["function"]["name"] for tool in chat_tools(tools)]
    if name in known:
        return name
    local = [
        flat_name(tool.get("name"), name)
        for tool in tools
        if tool.get("type") == "namespace"
        and any(inner.get("name") == name for inner in objects(tool.get("tools")))
    ]
    return local[0] if len(local) == 1 else None


def custom_arguments(text: object) -> str:
    """A custom tool's input as the arguments of its function."""
    return json.dumps({_INPUT: text if isinstance(text, str) else ""}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """The input in a function's arguments; the arguments themselves if they have another form."""
    try:
        text = obj(json.loads(arguments)).get(_INPUT)
    except (ValueError, RecursionError):
        return arguments
    return _whole(text) if isinstance(text, str) else arguments


class InputReader:
    """Reads a custom tool's input out of arguments that come in pieces."""

    def __init__(self) -> None:
        self._opened = False
        self._rest = ""

    def feed(self, piece: str) -> str:
        """The part of the input that a piece adds."""
        self._rest += piece
        if not self._opened:
            opening = _OPENING.match(self._rest)
            if opening is None:
                return ""
            self._opened, self._rest = True, self._rest[opening.end() :]
        found = _TEXT.match(self._rest)
        text = found[0] if found is not None else ""
        half = _HALF.search(text)
        text = text if half is None else text[: half.start()]
        self._rest = self._rest[len(text) :]
        return _whole(json.loads(f'"{text}"'))


class ToolNames:
    """The client's names for the functions that the model calls."""

    def __init__(self, body: Json) -> None:
        tools = objects(body.get("tools"))
        self._custom = {tool.get("name") for tool in tools if tool.get("type") == "custom"}
        self._namespaces = {
            flat_name(tool.get("name"), inner.get("name")): (tool.get("name"), inner.get("name"))
            for tool in tools
            if tool.get("type") == "namespace"
            for inner in objects(tool.get("tools"))
        }

    def is_custom(self, name: object) -> bool:
        """Whether the function is a custom tool."""
        return name in self._custom

    def item(self, item_id: str, call_id: object, name: object, status: str) -> Json:
        """The item of a call, without its arguments or its input."""
        if self.is_custom(name):
            return {
                "call_id": call_id,
                "input": "",
                "name": name,
                "type": "custom_tool_call",
                "id": item_id,
                "caller": None,
                "namespace": None,
            }
        namespace, local = self._namespaces.get(str(name), (None, name))
        return {
            "arguments": "",
            "call_id": call_id,
            "name": local,
            "type": "function_call",
            "id": item_id,
            "caller": None,
            "namespace": namespace,
            "status": status,
        }


def _whole(text: str) -> str:
    """The text with a replacement for every half of a surrogate pair without the other half."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _function(tool: Json, name: object) -> Json:
    function = {"name": name, **{field: tool.get(field) for field in _FIELDS[1:]}}
    held = {field: value for field, value in function.items() if value is not None}
    return {"type": "function", "function": held}


def _described(tool: Json) -> str | None:
    form = obj(tool.get("format"))
    if form.get("type") != "grammar":
        return tool.get("description")
    rule = f"The input follows this {form.get('syntax')} grammar:\n{form.get('definition')}"
    return f"{tool['description']}\n\n{rule}" if tool.get("description") else rule
