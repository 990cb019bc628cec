"""What could end or stall the engine for everyone is refused, and what people use is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.guard import refusal, tame

HELLO = [{"role": "user", "content": "hi"}]


def told(**fields: Any) -> str:
    """What the client of a request is told; nothing if the request may pass."""
    found = refusal({"messages": HELLO, **fields}, names_adapter=False)
    return "" if found is None else found.message


def added(tool: dict[str, Any]) -> dict[str, Any]:
    """The message with which a client of the Messages API adds a tool."""
    return {"role": "system", "content": [{"type": "tool_addition", "tool": tool}]}


def places(schema: Any) -> list[dict[str, Any]]:
    """Requests that have the engine compile `schema`."""
    text = json.dumps(schema)
    named = {"name": "f", "schema": schema}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    strict = {"type": "function", "name": "f", "parameters": schema, "strict": True}
    claude = {"name": "f", "input_schema": schema}
    strict_claude = {**claude, "strict": True}
    space = {"type": "namespace", "name": "n", "tools": [strict]}
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}}
    legacy = {
        "structures": [{"begin": "<f>", "schema": schema, "end": "</f>"}],
        "triggers": ["<f>"],
    }
    return [
        {"response_format": {"type": "json_schema", "json_schema": named}},
        {"response_format": tag},
        {"response_format": {"type": "structural_tag", **legacy}},
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"json": text}},
        {"structured_outputs": {"structural_tag": json.dumps(tag)}},
        {"guided_json": text},
        {"tools": [tool], "tool_choice": "required"},
        {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": [tool], "parallel_tool_calls": False},
        {"tools": [{**tool, "function": {**tool["function"], "strict": True}}]},
        {"tools": [strict], "tool_choice": "auto"},
        {"tools": [claude], "tool_choice": {"type": "any"}},
        {"tools": [space]},
        {"messages": [*HELLO, added(claude)], "tool_choice": {"type": "any"}},
        {"messages": [*HELLO, added({"type": "tool_definition", "definition": strict_claude})]},
        {"text": {"format": {"type": "json_schema", **named}}},
        {"output_format": {"type": "json_schema", "schema": schema}},
    ]


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


BOMBS: list[tuple[Any, str]] = [
    ({"type": "array", "minItems": 1_000_000_000}, "minItems = 1000000000: at most 10000."),
    ({"type": "array", "maxItems": 2e7}, "maxItems = 20000000.0"),
    ({"type": "array", "contains": {}, "minContains": 10**30}, "minContains"),
    ({"type": "object", "minProperties": 50_000}, "minProperties"),
    ({"type": "string", "minLength": 10**9}, "minLength = 1000000000: at most 1000000."),
    ({"properties": {"minItems": {"items": {"maxProperties": 1e300}}}}, "maxProperties"),
    ({"properties": {"default": {"type": "array", "minItems": 70_000}}}, "default.minItems"),
    ({"$defs": {"d": {"minItems": 70_000}}, "$ref": "#/$defs/d"}, "$defs.d.minItems"),
    ({"anyOf": [{}, {"prefixItems": [{"minItems": 70_000}]}]}, "anyOf[1].prefixItems[0].minItems"),
    ({"pattern": "^.{1,5000}$"}, "pattern repeats 5000"),
    ({"pattern": "^[a-z]{99999999999999999999}$"}, "pattern repeats"),
    ({"patternProperties": {"^a{1,4000}": {}}}, "repeats 4000"),
    ({"properties": {f"p{n}": {"pattern": "a{900}"} for n in range(3)}}, "All patterns repeat"),
    ({"pattern": ".{1,999}" * 3}, "pattern repeats 1730 times: at most 1000"),
    ({"pattern": "a{999}" * 1400}, "pattern repeats 1398600 times"),
    ({"pattern": r"([^)]{1,40}\)[(]){1026}"}, "pattern repeats 41040"),
    ({"pattern": r"(?:x{20}y){1001}"}, "pattern repeats 20020"),
    ({"pattern": "(?:a{1000}){1000}"}, "pattern repeats 1000000"),
    ({"pattern": "(" * 40 + "a" + "{9999999999})" * 40}, "pattern repeats 1000000000"),
    ({"patternProperties": {"^" + "[a-z]{1,60}" * 20: {}}}, "can be read in 240000 ways"),
    ({"pattern": "[^}]{0,60}" * 3}, "pattern can be read in 10800 ways: at most 2000"),
    ({"pattern": ".?" * 32}, "can be read in 2048 ways"),
    ({"pattern": r"(\W?\w{0,9}){7}"}, "can be read in"),
    ({"pattern": "(.{0,9})" * 20}, "can be read in"),
    ({"pattern": "( .{0,20})?" * 20}, "can be read in"),
    ({"pattern": "((?<name>.?)|b)" * 40}, "can be read in"),
    ({"properties": {f"p{n}": {"pattern": ".?" * 25} for n in range(4)}}, "All patterns together"),
    ({"pattern": ".?" * 151}, "pattern lets 151 parts be left out: at most 150"),
    ({"pattern": "((.?){10}){100}"}, "lets 1000 parts"),
    ({"pattern": "(.{0,2}){160}"}, "lets 160 parts"),
    ({"pattern": "(a|)" * 100 + "(?:|b)" * 100}, "lets 200 parts"),
    ({"pattern": "a*?" * 80 + r"\w{0,1}" * 80}, "lets 160 parts"),
    (
        {"properties": {f"p{n}": {"pattern": r"\d?" * 149} for n in range(5)}},
        "leaves out 333 times",
    ),
    ({"properties": {f"p{n}": {} for n in range(1001)}}, "1001 entries"),
    ({"anyOf": [{}] * 1001}, "1001 entries"),
    ({"enum": [f"v{n}" for n in range(10_001)]}, "10001 entries"),
    ({"const": "x" * 10_001}, "10001 characters"),
    ({"enum": ["x" * 6000 + str(n) for n in range(20)]}, "characters"),
    ({"items": [{"items": [{}] * 60}] * 60}, "3001 objects"),
    ({"anyOf": [{"minLength": 900_000}] * 12}, "add up"),
    (nested(101), "nested deeper"),
    ({"$ref": "#/default", "default": {"minItems": 70_000}}, "default.minItems = 70000"),
    ({"$ref": "#/examples/x", "examples": {"x": {"minItems": 70_001}}}, "examples.x.minItems"),
    ({"title": {"items": {"maxItems": 70_002}}, "items": {"$ref": "#/%74itle"}}, "title.items"),
    (
        {
            "properties": {
                "a": {"$comment": {"a": {"minItems": 70_003}}, "$ref": "#/properties/b"},
                "b": {"$ref": "#/properties/a/$comment/a"},
            }
        },
        "$comment.a.minItems",
    ),
]


@pytest.mark.parametrize(("schema", "message"), BOMBS, ids=[message for _, message in BOMBS])
def test_a_schema_that_could_end_the_engine_is_refused_wherever_it_stands(
    schema: Any, message: str
) -> None:
    for fields in places(schema):
        assert message in told(**fields), fields.keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regex": "(a{5}){100001}"}, "structured_outputs.regex repeats 500005 times"),
        ({"regex": "a{60000}b{0,60000}"}, "structured_outputs.regex repeats 120000 times"),
        ({"regex": ".?" * 501}, "structured_outputs.regex lets 501 parts"),
        ({"grammar": "root ::= " + "[a-z]* " * 1001}, "grammar lets 1001 parts"),
        ({"regex": "b" * 10_001}, "10001 characters"),
        ({"choice": ["a"] * 10_001}, "choice has 10001 entries"),
        ({"choice": ["a" * 10_001]}, "choice[0] has 10001 characters"),
        ({"grammar": 'root ::= "a"{1000000000}'}, "grammar repeats"),
        ({"grammar": 'start: "a"~1..300000'}, "grammar repeats 300000"),
        ({"grammar": 'root ::= "' + "a" * 10_001 + '"'}, "in a row"),
        ({"grammar": "root ::= a\n" * 10_000}, "characters"),
    ],
)
def test_a_grammar_that_could_end_the_engine_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    assert message in told(structured_outputs=fields)


UUID = "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
VERSION = (
    r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(?:-((?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)"
    r"(?:\.(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?(?:\+([0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*))?$"
)
_H = "[0-9a-fA-F]{1,4}"
_B = "(25[0-5]|(2[0-4]|1{0,1}[0-9]){0,1}[0-9])"
IPV6 = (
    f"(({_H}:){{7,7}}{_H}|({_H}:){{1,7}}:|({_H}:){{1,6}}:{_H}|({_H}:){{1,5}}(:{_H}){{1,2}}|"
    f"({_H}:){{1,4}}(:{_H}){{1,3}}|({_H}:){{1,3}}(:{_H}){{1,4}}|({_H}:){{1,2}}(:{_H}){{1,5}}|"
    f"{_H}:((:{_H}){{1,6}})|:((:{_H}){{1,7}}|:)|fe80:(:[0-9a-fA-F]{{0,4}}){{0,4}}%[0-9a-zA-Z]{{1,}}|"
    rf"::(ffff(:0{{1,4}}){{0,1}}:){{0,1}}({_B}\.){{3,3}}{_B}|({_H}:){{1,4}}:({_B}\.){{3,3}}{_B})"
)
"""The longest expressions that are widely copied."""


USUAL = [
    r"^(- [^\n]{1,200}\n){1,10}$",
    r"^(\w{1,20}, ){1,20}\w{1,20}$",
    r"^[a-z0-9._%+-]{1,64}@[a-z0-9.-]{1,190}\.[a-z]{2,10}$",
    r"^#{1,6} [^\n]{1,80}\n(> [^\n]{1,200}\n){0,40}$",
    r"^\+?\d{1,3}[ -]?\(?\d{2,4}\)?([ -]?\d{2,4}){1,4}$",
    r"^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
    r"^(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?:25[0-5]|2[0-4]\d|1?\d?\d)){3}$",
    r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?(Z|[+-]\d{2}:\d{2})$",
]


def test_what_people_use_passes() -> None:
    schema = {
        "type": "object",
        "description": "x" * 20_000,
        "properties": {
            **{f"field{n}": {"type": "string", "maxLength": 4096} for n in range(300)},
            "size": {"type": "integer", "minimum": -(2**70), "maximum": 2**70},
            "name": {"type": "string", "pattern": "^[a-z]{1,255}$", "default": {"minItems": 1e12}},
            "many": {"type": "array", "minItems": 1, "maxItems": 1000, "items": {"$ref": "#"}},
            "kind": {"enum": [f"value-{n}" for n in range(2000)]},
        },
    }
    for fields in places(schema):
        assert told(**fields) == ""
    patterns = [UUID] * 150 + [VERSION, "^[a-z]{1,1000}$", "(abc){500}", r"[?*{1,]{3}", r"\(?[|]"]
    patterns += ["^(" + "|".join(f"value-{n}" for n in range(700)) + ")$", *[IPV6] * 8, *USUAL]
    schema = {"properties": {f"p{n}": {"pattern": one} for n, one in enumerate(patterns)}}
    for fields in places(schema):
        assert told(**fields) == ""
    harmless = {"type": "array", "maxItems": 2**31 - 1, "items": {"pattern": "^.{0,65535}$"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": harmless}}
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"tool_choice": None}):
        assert told(tools=[tool], **choice) == ""  # nothing of it is compiled


ESCAPED = [r"\??" * 400, "[?*]" * 900, r"\?\*" * 900, "(?:a)" * 900]


@pytest.mark.parametrize("regex", [*USUAL, *ESCAPED, IPV6, VERSION])
def test_only_what_may_be_left_out_of_a_guided_expression_counts(regex: str) -> None:
    assert told(structured_outputs={"regex": regex}) == told(guided_regex=regex) == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": "2000.0"}, "n = 2000: at most 1024 choices."),
        ({"n": " 1_025 "}, "n = 1025"),
        ({"n": 1025.0}, "n = 1025"),
        ({"n": "+00001500.000"}, "n = 1500"),
        ({"n": "0" * 5000 + "1_600"}, "n = 1600"),
        ({"best_of": "1_0000"}, "best_of = 10000"),
        ({"n": "2", "prompt": ["a"] * 600}, "n = 2 for 600 prompts"),
        ({"top_logprobs": 151_936.0}, "top_logprobs = 151936.0: at most 1024."),
        ({"logprobs": "5_000"}, "logprobs = 5_000"),
        ({"logprob_token_ids": [1] * 129}, "logprob_token_ids has 129 entries"),
        ({"stop": ["a"] * 1025}, "stop has 1025 entries"),
        ({"repetition_detection": {"max_pattern_size": "30000"}}, "max_pattern_size = 30000"),
        ({"echo": "Yes", "logprobs": 1}, "echo"),
    ],
)
def test_numbers_are_bounded_as_the_engine_reads_them(fields: dict[str, Any], message: str) -> None:
    assert message in told(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": "1024"},
        {"n": "2e9"},  # no number for the engine: it refuses it itself
        {"n": None},
        {"prompt": [1.0] * 2000, "n": 2},
        {"echo": "false", "logprobs": 1},
        {"echo": 0, "logprobs": True},
        {"logprobs": True, "top_logprobs": 20},
    ],
)
def test_what_the_engine_takes_or_refuses_without_harm_passes(fields: dict[str, Any]) -> None:
    assert told(**fields) == ""


@pytest.mark.parametrize(
    ("sent", "got"),
    [(-1, 0), (0, 0), (3, 3), (10, 9), ("-2000.0", 0), (2**63, 9), (True, 1), ("no", "no")],
)
def test_a_priority_stays_between_other_agents_and_the_judge(sent: Any, got: Any) -> None:
    body: dict[str, Any] = {"priority": sent}
    tame(body, "main", salted=False)
    assert body == {"priority": got}


def test_a_salt_counts_only_within_its_lineage() -> None:
    def salt(lineage: str, salted: bool = True, **body: Any) -> Any:
        tame(body, lineage, salted=salted)
        return body.get("cache_salt")

    made = {salt("a"), salt("b"), salt("a", cache_salt="x"), salt("b", cache_salt="x")}
    made.add(salt("b", cache_salt=salt("a")))
    assert len(made) == 5
    assert salt("a", cache_salt="x") == salt("a", cache_salt="x")
    assert salt("a", salted=False) is None
    for refused in ("", "a@b", "x" * 129, 5, ["x"]):
        assert salt("a", cache_salt=refused) == refused
