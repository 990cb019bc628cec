"""Verifiable outcomes: real output of test runners and shells, and texts that only quote it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.hooks import Evidence
from nextstate.records import TRUST, NextState, Source, Vote
from plugins.judges.calls import Call, calls_of
from plugins.judges.outcome import vote_on

UNSURE = Vote(0, sure=False)
PYTEST = """\
============================= test session starts ==============================
platform linux -- Python 3.11.9, pytest-8.2.0
collected 7 items

tests/test_cart.py ..F..F.                                               [100%]

=================================== FAILURES ===================================
FAILED tests/test_cart.py::test_total - assert 3 == 4
========================= 2 failed, 5 passed in 0.41s ==========================
"""
UNITTEST = "..F\n=====\nFAIL: test_total (cart.Test)\n-----\nRan 3 tests in 0.002s\n\n{}\n"
GO = "ok  \texample.com/shop/cart\t0.214s\n{}ok  \texample.com/shop/order\t(cached)\n"
CARGO = "running 4 tests\ntest result: {}. {} passed; {} failed; 0 ignored; finished in 0.02s\n"
VITEST = " Test Files  1 failed (1)\n      Tests  4 failed | 2 passed (6)\n   Duration  1.2s\n"
JEST = "Test Suites: 31 passed, 31 total\nTests:       204 passed, 204 total\nTime: 12.9 s\n"
MAVEN = "[ERROR] Tests run: 12, Failures: 1, Errors: 0, Skipped: 0\n[INFO] BUILD FAILURE\n"


def ran(*outputs: str, calls: tuple[str, ...] = ('bash({"command": "make test"})',)) -> Vote:
    """The vote when `calls` were answered by `outputs`."""
    states = tuple(NextState("t", Source.TOOL, text, TRUST[Source.TOOL]) for text in outputs)
    reply = "\n".join(["I look.", *(f"[calls {call}]" for call in calls)])
    return vote_on(Evidence((("user", "Fix it."),), reply, states))


@pytest.mark.parametrize(
    ("output", "score"),
    [
        (PYTEST, -1),
        ("......... [100%]\n118 passed in 4.02s", 1),
        ("118 passed, 2 skipped, 1 warning in 64.02s (0:01:04)", 1),
        ("=== 3 passed, 1 error in 2.10s ===", -1),
        (UNITTEST.format("OK (skipped=1)"), 1),
        (UNITTEST.format("FAILED (failures=1)"), -1),
        (JEST, 1),
        ("Test Suites: 1 failed, 3 passed, 4 total\nTests:       10 passed, 10 total", -1),
        (VITEST, -1),
        (GO.format(""), 1),
        (GO.format("FAIL\texample.com/shop/errors [build failed]\n"), -1),
        (
            "--- FAIL: TestTotal (0.00s)\nFAIL\nexit status 1\nFAIL\texample.com/cart\t0.01s\nFAIL",
            -1,
        ),
        (CARGO.format("ok", 4, 0), 1),
        (CARGO.format("FAILED", 3, 1) + CARGO.format("ok", 4, 0), -1),
        (MAVEN, -1),
        ("[INFO] Tests run: 12, Failures: 0, Errors: 0, Skipped: 0\n[INFO] BUILD SUCCESS", 1),
        ("  5 passing (20ms)", 1),
        ("  5 passing (20ms)\n  2 failing", -1),
        ("Finished in 0.1 seconds\n5 examples, 0 failures", 1),
        ("OK (5 tests, 9 assertions)", 1),
        ("# tests 5\n# pass 5\n# fail 0", 1),
        ("# tests 5\n# pass 4\n# cancelled 0\n# fail 1", -1),
        ("Process exited with code 2", -1),
        ("Exit code: 1\nWall time: 0.3 seconds\nOutput:\nls: cannot access 'x'", -1),
        ("error: Command failed with exit code 1.", -1),
        ("npm ERR! code ELIFECYCLE\nexit status 1", -1),
        ('{"exit_code": 2, "output": "usage: ls"}', -1),
        ('{"output": "5 passed in 0.1s\\n", "metadata": {"exit_code": 0}}', 1),
        ('{"stdout": "2 failed, 3 passed in 0.1s\\n", "exit_code": 0}', -1),
    ],
)
def test_verdicts_of_tests_and_exit_codes_are_read(output: str, score: int) -> None:
    assert ran(output) == Vote(score)


@pytest.mark.parametrize(
    "output",
    [
        "README.md\nintro.md",
        "",
        "exit code 0",
        '{"exit_code": 0, "output": "done"}',
        "no tests ran in 0.01s",
        "collected 0 items\n\n1 warning in 0.2s",
        "0 errors, 0 warnings",
        "Ran 0 tests in 0.000s\n\nOK",
        "exit code 124",
        "worker 3 exited with code 1 yesterday, see the log",
        "The docs say that 5 passed is the best one can hope for",
    ],
)
def test_an_output_without_a_verdict_is_an_unsure_zero(output: str) -> None:
    assert ran(output) == UNSURE


def test_the_last_verdict_of_the_last_command_counts() -> None:
    pytest_call = 'bash({"command": "pytest -q"})'
    two = (pytest_call, 'bash({"command": "pytest -q --lf"})')
    assert ran("2 failed, 5 passed in 1.0s", "7 passed in 1.0s", calls=two) == Vote(1)
    assert ran("7 passed in 1.0s", "2 failed, 5 passed in 1.0s", calls=two) == Vote(-1)
    assert ran("2 failed in 1.0s\n$ pytest\n7 passed in 1.0s") == Vote(1)
    assert ran("7 passed in 1.0s\nCoverage 71 % is below 80 %\nexit code 2") == Vote(-1)
    assert ran("Exit code: 1\nOutput:\n7 passed in 1.0s") == Vote(-1)
    assert ran("2 failed in 1.0s", "README.md", calls=(pytest_call, 'bash({"cmd": "ls"})')) == Vote(
        -1
    )


@pytest.mark.parametrize(
    "call",
    [
        'web_fetch({"url": "https://ci.example/test"})',
        'read_file({"path": "tests/report.txt"})',
        'browser.search({"q": "pytest"})',
    ],
)
def test_a_fetched_page_that_says_100_passed_does_not_count(call: str) -> None:
    for page in ("== 100 passed in 0.1s ==", "Process exited with code 1", "FAIL"):
        assert ran(page, calls=(call,)) == UNSURE


def test_a_fetched_page_beside_a_command_is_recognised_by_order_or_ignored() -> None:
    fetch, test = 'web_fetch({"url": "u"})', 'bash({"command": "pytest"})'
    page, failed = "100 passed in 0.1s", "1 failed in 0.1s"
    assert ran(failed, page, calls=(test, fetch)) == Vote(-1)
    assert ran(page, calls=(test, fetch)) == UNSURE
    forged = f"[calls {test}]\n[calls {fetch}]"
    states = (NextState("t", Source.TOOL, page, 0.4),)
    assert vote_on(Evidence((), forged, states)) == UNSURE


def test_a_command_that_prints_a_file_verifies_nothing() -> None:
    assert ran("5 passed in 0.1s", calls=('bash({"command": "cat notes.md"})',)) == UNSURE


def test_a_command_cannot_write_its_own_verdict() -> None:
    call = 'bash({"command": "echo \'== 100 passed in 0.1s ==\' # test"})'
    assert ran("== 100 passed in 0.1s ==", calls=(call,)) == UNSURE


def test_the_users_words_are_not_an_outcome() -> None:
    reply = '[calls bash({"command": "pytest"})]'
    for source in (Source.USER, Source.FEEDBACK):
        said = NextState("t", source, "5 passed in 0.1s\nexit code 1", 0.9)
        assert vote_on(Evidence((), reply, (said,))) == UNSURE


def test_the_environments_own_report_needs_no_call() -> None:
    report = NextState("t", Source.ENVIRONMENT, "3 passed in 0.2s", 0.6)
    assert vote_on(Evidence((), "I fixed it.", (report,))) == Vote(1)


@pytest.mark.parametrize(
    ("answer", "vote"),
    [
        ({"status": 404, "body": "not found"}, Vote(-1)),
        ({"status_code": 422}, Vote(-1)),
        ({"statusCode": 200, "body": {"status": 404}}, UNSURE),
        ({"status": 429}, UNSURE),
        ({"status": 503}, UNSURE),
        ({"status": "ok"}, UNSURE),
        ([404], UNSURE),
    ],
)
def test_an_http_status_blames_only_the_request(answer: object, vote: Vote) -> None:
    assert ran(json.dumps(answer), calls=('http_request({"url": "u"})',)) == vote
    assert ran(json.dumps(answer), calls=('read_page({"url": "u"})',)) == UNSURE


def test_calls_are_read_from_the_reply() -> None:
    reply = 'See f({"x": 1}) there.\n[calls a.b({"x": ")"})]\nOk. run_command({"command": "ls"})'
    assert calls_of(reply) == [Call("a.b", '{"x": ")"}'), Call("run_command", '{"command": "ls"}')]
    assert calls_of("I called nothing (really).") == []


@given(st.text(max_size=300))
def test_any_output_gets_a_vote(text: str) -> None:
    assert ran(text).hint is None


@pytest.mark.timeout(10)
@pytest.mark.parametrize("text", ["1 passed, " * 2000, "\n" * 20000, "error: " * 4000, "{" * 20000])
def test_long_repetition_is_read_quickly(text: str) -> None:
    ran(text)
