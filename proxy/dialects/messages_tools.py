"""The tools of a Messages request. System messages among the others may add and remove some."""

from __future__ import annotations

from nextstate.records import Json
from nextstate.wire import obj, objects


def tools_in_effect(body: Json) -> list[Json]:
    """The tools after all additions and removals."""
    listed, changes = objects(body.get("tools")), tool_changes(body)
    if not changes:
        return listed
    tools = {str(tool.get("name")): tool for tool in listed}
    removed: set[str] = set()
    for change, named in changes:
        name = str(named.get("name"))
        if change == "tool_removal":
            removed.add(name)
            continue
        removed.discard(name)
        known = {**tools.get(name, {}), "defer_loading": None}
        tools[name] = known if named.get("type") == "tool_reference" else named
    return [tool for name, tool in tools.items() if name not in removed]


def tool_changes(body: Json) -> list[tuple[str, Json]]:
    """(addition or removal, the tool's reference or definition), in the order of the messages."""
    found: list[tuple[str, Json]] = []
    for message in objects(body.get("messages")):
        for block in objects(message.get("content")):
            if block.get("type") in ("tool_addition", "tool_removal"):
                tool = obj(block.get("tool"))
                defined = tool.get("type") == "tool_definition"
                found.append((block["type"], obj(tool.get("definition")) if defined else tool))
    return found
