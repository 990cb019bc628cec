"""Attacks on a running proxy, its page, its files and its judge: what must be true after each.

Requests are in tables, attacks of several steps are functions. Whatever an attack tries: nothing is
recorded or changed, the engine gets nothing that was refused, no answer and no line of the log
holds a key, a path or another one's words, and both proxies go on answering.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.attacks import from_clients, from_network, from_pages, in_texts, on_engine, on_machine
from tests.attacks.lab import CONDITIONS, TAUGHT, WORD, Attack, Attacker, Lab, lab
from tests.proxy.running_proxy import request

REQUESTS = [*from_pages.ATTACKS, *from_clients.ATTACKS, *from_network.ATTACKS]
LEAST = 250
STEPS = (in_texts, on_engine, on_machine)
"""Modules that put their attacks into CONDITIONS."""


@asynccontextmanager
async def furnished() -> AsyncGenerator[Lab]:
    """A lab in a folder that other accounts can reach, as far as its own rights let them."""
    with tempfile.TemporaryDirectory(prefix="nextstate-attacks-") as name:
        os.chmod(name, 0o755)
        async with lab(Path(name)) as found:
            yield found


async def wrong_with(lab: Lab, attack: Attack) -> list[str]:
    """What a request did that it must not."""
    before = lab.held or lab.hold()
    answer = await lab.send(attack)
    statuses = [attack.status] if isinstance(attack.status, int) else attack.status
    found = [] if answer.status in statuses else [f"answered {answer.raw[:300]!r}"]
    found += [f"changed {name}" for name in lab.harm(before, reaches=attack.reaches)]
    found += [f"told {what}" for what in lab.told(answer.raw)]
    if attack.says and attack.says.encode() not in answer.raw:
        found.append(f"does not say {attack.says!r}: {answer.raw[:300]!r}")
    return [f"{attack.attacker}: {attack.name}: {one}" for one in found]


async def all_of(long: bool) -> list[str]:
    wrong: list[str] = []
    async with furnished() as lab:
        for attack in REQUESTS:
            wrong += await wrong_with(lab, attack)
        await lab.alive()
        for name, attacker, happens, slow in CONDITIONS:
            if long or not slow:
                try:
                    async with asyncio.timeout(300):
                        await happens(lab)
                except Exception as error:  # whatever it was, the others go on
                    wrong.append(f"{attacker}: {name}: {error!r:.600}")
                await lab.alive()
        wrong += [f"the log has {line[:200]!r}" for line in lab.log if telling(lab, line)]
    return wrong


def telling(lab: Lab, line: str) -> bool:
    """Whether a line of the log tells what it must not, or writes to a terminal."""
    own = f"{line}".isprintable() or line.startswith("Traceback")
    return WORD in line or TAUGHT in line or any(key in line for key in lab.keys) or not own


def test_the_suite_is_large_and_has_every_attacker() -> None:
    names = [(attack.attacker, attack.name) for attack in REQUESTS]
    names += [(attacker, name) for name, attacker, _, _ in CONDITIONS]
    assert len({*names}) == len(names), [one for one, n in Counter(names).items() if n > 1]
    assert len(names) >= LEAST
    assert {attacker for attacker, _ in names} == {*Attacker}


def test_the_suite_notices_what_is_told_changed_reached_or_refused() -> None:
    key, path = ("Authorization: Bearer $player$",), "/v1/chat/completions"
    controls = (
        (Attack("reads", Attacker.CLIENT, "/v1/episodes/e-main", 404, key), ["answered", "told"]),
        (Attack("asks", Attacker.CLIENT, path, 200, key, request("hi")), ["changed"]),
        (Attack("says", Attacker.CLIENT, "/v1/no", 404, key, says="?!"), ["changed", "does"]),
    )

    async def run() -> None:
        async with furnished() as lab:
            for attack, expected in controls:
                found = " ".join(await wrong_with(lab, attack)).split()
                assert {*expected} <= {*found}, found

    asyncio.run(run())


@pytest.mark.timeout(600)
def test_no_attack_reads_changes_or_stops_anything() -> None:
    assert asyncio.run(all_of(long=False)) == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_no_attack_reads_changes_or_stops_anything_in_the_long_form() -> None:
    assert asyncio.run(all_of(long=True)) == []
