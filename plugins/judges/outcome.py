"""A judge of what can be verified: test summaries, exit codes and explicit HTTP statuses.

It reads only tools that execute, and the environment if the reply calls one of them or none: a
fetched page may also say "100 passed", and a file that is printed ran nothing.

- A failed test or a non-zero exit code is -1.
- Passed tests are +1 if a call of the reply names something that checks.
- Exit code 0 says only that a command ran, so it does not count.
- What a stranger wrote, a text without trust, does not count.
- A summary that stands in the call's own arguments (`echo "5 passed"`) does not count.
- What stopped a command from outside (a timeout, a kill, a busy server) does not count.
- If results contradict each other, the last one of the last command counts, and the exit code
  counts as the last.
- Without any result the vote is an unsure 0.

It cannot see through a command that composes its summary from pieces, or through a program that
prints a file while its call names a test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from nextstate.hooks import Evidence, JudgeKind, JudgeSettings
from nextstate.records import Json, Source, Vote
from plugins.judges import WithoutModel
from plugins.judges.calls import Call, calls_of

EXECUTING = (
    "exec", "bash", "shell", "run", "terminal", "test", "python", "process", "command", "console",
    "powershell", "kernel", "notebook", "code_interpreter",
)  # fmt: skip
"""A tool whose name contains one of these executes; any other only fetches or stores."""

REQUESTING = ("http", "request", "curl", "api", "webhook")
"""A tool whose name contains one of these reports an HTTP status of its own."""

_CHECKS = re.compile(
    r"test|spec|check|verif|tox|nox|jest|mocha|\bava\b|rspec|cargo|mvn|maven|gradle|\bmake\b|"
    r"npm (?:t|run)\b|yarn|pnpm|bazel|ctest|phpunit|dotnet|\bbun\b|\bdeno\b|\bjust\b|\bci\b",
    re.IGNORECASE,
)
_PARTS = re.compile(r"[;&|\n]+")
_PRINTS = frozenset(
    ("cat", "head", "tail", "less", "more", "grep", "rg", "sed", "awk", "echo", "printf", "curl",
     "wget", "lynx", "bat", "sort", "uniq", "cut", "tr", "jq", "strings", "zcat", "nl", "tac")
)  # fmt: skip
"""Programs that only show texts."""
_BESIDE = frozenset(("cd", "pushd", "set", "true", "sleep"))
_STOPPED = frozenset({124, 130, 137, 143})
"""Exit codes of `timeout`, an interrupt and a kill: something outside ended the command."""

_EXIT = re.compile(
    r"^[^\w\n]{0,20}(?:(?:error|the|process|command|program|script|shell|terminal|task|job|finished|failed|"
    r"completed|terminated|with|and)[^\w\n]{1,5}){0,5}"
    r"(?:exit(?:ed)?|returned)(?:[ _]?(?:with )?(?:an? )?(?:non-zero )?(?:exit )?(?:code|status)?)"
    r"[ ]{0,20}[:=]?[ ]{0,20}(?P<code>-?\d+)[^\w\n]{0,20}$",
    re.IGNORECASE | re.MULTILINE,
)
_JSON_EXIT = re.compile(
    r"(?<!\\)\"(?:exit_?code|exit_?status|return_?code)\"\s*:\s*(?P<code>-?\d+)", re.IGNORECASE
)
_JSON_TEXT = re.compile(r"\\[rn]|(?<!\\)\"")
_STATUS_KEYS = ("status", "status_code", "statusCode", "http_status", "httpStatus")
_BUSY = frozenset({408, 425, 429})
"""A server that answers so may answer the same request later."""


@dataclass(frozen=True, slots=True)
class Report:
    """How one family of test runners writes its summary."""

    passed: Callable[[re.Match[str]], bool | None]
    """Whether a matched summary says that the tests passed; None when it ran no test."""
    line: re.Pattern[str]
    every: bool
    """True if there is a summary for each package, so that one failure decides."""


def _counted(match: re.Match[str]) -> bool | None:
    """By the counts in the line: False with any failure or error, else True with any pass."""
    counts = re.findall(r"(?<!\d)(\d+) (\w+)", match.group().replace("|", ","))
    if any(int(number) and word.startswith(("fail", "error")) for number, word in counts):
        return False
    return any(int(number) and word.startswith("pass") for number, word in counts) or None


def _without_failures(match: re.Match[str]) -> bool | None:
    """By named groups: `ran` is the total, all others count failures."""
    failed = any(int(n or 0) for name, n in match.groupdict().items() if name != "ran")
    return False if failed else bool(int(match["ran"])) or None


def _worded(match: re.Match[str]) -> bool:
    return match["good"] is not None


def _report(
    passed: Callable[[re.Match[str]], bool | None], line: str, every: bool = False
) -> Report:
    return Report(passed, re.compile(line, re.MULTILINE), every)


def _line(pattern: str) -> str:
    return rf"^[ \t]*{pattern}[ \t=]*\r?$"


_COUNT = r"\d+ (?:passed|failed|errors?|skipped|xfailed|xpassed|warnings?|deselected|todo|total)"
_TIMES = r"(?: in [\d.:]+ ?s(?: \([\d:]+\))?)?"
_JEST = r"(?:Tests|Test Files|Test Suites):?[ ]+"
REPORTS: Sequence[Report] = (
    # pytest: "== 2 failed, 5 passed in 0.40s ==", quiet or not
    _report(_counted, _line(rf"=*[ ]?{_COUNT}(?:, {_COUNT})*{_TIMES}")),
    # jest: "Tests: 1 failed, 3 passed, 4 total"; vitest: "Tests  4 failed | 2 passed (6)"
    _report(_counted, _line(rf"{_JEST}{_COUNT}(?:(?:, | \| ){_COUNT})*(?: \(\d+\))?"), every=True),
    # unittest: "Ran 3 tests in 0.1s", then "OK" or "FAILED (failures=1)"
    _report(_worded, r"^Ran [1-9]\d* tests? in [\d.]+s\s+(?:(?P<good>OK)\b|FAILED \()"),
    # go: a line for each package
    _report(
        _worded,
        r"^(?:(?P<good>ok)[ \t]+\S+[ \t]+(?:[\d.]+s|\(cached\))"
        r"|FAIL(?:[ \t]+\S+[ \t]+(?:[\d.]+s|\[.*\]))?[ \t]*$|--- FAIL: )",
        every=True,
    ),
    # cargo: a line for each crate
    _report(
        _without_failures,
        r"^test result: (?:ok|FAILED)\. (?P<ran>\d+) passed; (?P<failed>\d+) failed",
        every=True,
    ),
    # surefire and other JUnit runners: a line for each class, then the sum
    _report(
        _without_failures,
        r"Tests run: (?P<ran>\d+), Failures: (?P<failed>\d+)(?:, Errors: (?P<errors>\d+))?",
        every=True,
    ),
    # mocha
    _report(
        _worded, _line(r"[1-9]\d* (?:(?P<good>passing) \(\d+(?:ms|s|m)\)|failing)"), every=True
    ),
    # rspec
    _report(
        _without_failures,
        _line(r"(?P<ran>\d+) examples?, (?P<failed>\d+) failures?(?:, \d+ pending)?"),
    ),
    # phpunit
    _report(_worded, r"^(?:(?P<good>OK) \([1-9]\d* tests?, \d+ assertions?\)|FAILURES!|ERRORS!)$"),
    # node --test and other TAP summaries
    _report(
        _without_failures,
        r"^# pass (?P<ran>\d+)\n(?:#(?! pass ).*\n)*?# fail (?P<failed>\d+)$",
    ),
)


def create(settings: JudgeSettings) -> JudgeKind:
    """The plugin's entry; it needs no settings."""
    return WithoutModel("outcome", vote_on)


def vote_on(evidence: Evidence) -> Vote:
    """The vote by the last result of the last command that gave one."""
    verdicts = [
        passed
        for text, calls, executed in results(evidence)
        if (passed := verdict(text, calls) if executed else status_verdict(text)) is not None
    ]
    return Vote(1 if verdicts[-1] else -1) if verdicts else Vote(0, sure=False)


def results(evidence: Evidence) -> Iterator[tuple[str, list[Call] | None, bool]]:
    """(text, calls that it may come from, whether they execute) of each output.

    If there are as many tool results as calls, they belong together in order. Otherwise every call
    of the reply must be of the same kind. The environment's own reports have no call: None.
    """
    calls = calls_of(evidence.reply)
    tools = [state for state in evidence.next_states if state.source is Source.TOOL]
    own = iter([[call] for call in calls] if len(calls) == len(tools) else [calls] * len(tools))
    for state in evidence.next_states:
        if state.source is Source.ENVIRONMENT:
            if not calls or any(_named(call, EXECUTING) for call in calls):
                yield state.text, None, True
        elif state.source is Source.TOOL and (made := next(own)) and state.trust > 0:
            if all(_named(call, EXECUTING) for call in made):
                if not all(map(only_prints, made)):
                    yield state.text, made, True
            elif all(_named(call, REQUESTING) for call in made):
                yield state.text, made, False


def only_prints(call: Call) -> bool:
    """Whether every command of a call only shows what is there already, or fetches it.

    >>> only_prints(Call("bash", '{"command": "cat test.log | tail -3"}'))
    True
    >>> only_prints(Call("bash", '{"command": "cd app && pytest -q | tail -3"}'))
    False
    """
    try:
        given = json.loads(call.arguments)
    except (ValueError, RecursionError):
        return False
    named = cast(Json, given) if isinstance(given, dict) else {}
    command = named.get("command", named.get("cmd"))
    if not isinstance(command, str):
        return False
    first = [words[0] for part in _PARTS.split(command) if (words := part.split())]
    programs = {word.rpartition("/")[2] for word in first} - _BESIDE
    return bool(programs) and programs <= _PRINTS


def verdict(text: str, calls: Sequence[Call] | None) -> bool | None:
    """Whether a command's output says that it passed; None when it does not say."""
    lines = _JSON_TEXT.sub("\n", text) if text.lstrip().startswith("{") else text
    found = [_last_exit(text)]
    for report in REPORTS:
        summaries = [
            (match.end(), passed)
            for match in report.line.finditer(lines)
            if (passed := report.passed(match)) is not None and not _said_by(calls, match.group())
        ]
        if summaries:
            end, passed = summaries[-1]
            if report.every:
                passed = all(passed for _, passed in summaries)
            found.append((end, passed))
    _, passed = max((entry for entry in found if entry), default=(0, None))
    checks = calls is None or any(_CHECKS.search(f"{c.name} {c.arguments}") for c in calls)
    return None if passed and not checks else passed


def status_verdict(text: str) -> bool | None:
    """False for an HTTP status that blames the request, else None."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict):
        return None
    stated = [cast(Json, answer).get(key) for key in _STATUS_KEYS]
    blamed = any(isinstance(s, int) and 400 <= s < 500 and s not in _BUSY for s in stated)
    return False if blamed else None


def _last_exit(text: str) -> tuple[int, bool] | None:
    """(position, False) of the last exit code that blames the command; a wrapper's comes last."""
    if (match := _last(_JSON_EXIT, text)) or (
        match := _EXIT.match(text.lstrip().partition("\n")[0])
    ):
        place = len(text) + 1
    elif match := _last(_EXIT, text):
        place = match.end()
    else:
        return None
    code = int(match["code"])
    return None if code == 0 or code in _STOPPED else (place, False)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(reversed(list(pattern.finditer(text))), None)


def _said_by(calls: Sequence[Call] | None, line: str) -> bool:
    """Whether the line stands in the arguments of the call itself."""
    words = line.strip(" \t\r\n=")
    return any(words in call.arguments for call in calls or ())


def _named(call: Call, fragments: Sequence[str]) -> bool:
    return any(fragment in call.name.lower() for fragment in fragments)
