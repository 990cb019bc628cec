"""Forgetting from the page: it says what goes, asks, and takes only what the visitor may see."""

from __future__ import annotations

import subprocess
from pathlib import Path

from learner.folders import version_path
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from proxy.lineages import Access
from tests.page.running_page import Site, on_site, words
from tests.scripted_engine import write_weights
from tests.store.test_forgetting import judge, record, said

PROCESSES = subprocess  # the page starts `nextstate forget`
TURN, SESSION = "/page/turns/turn_1/forget", "/page/session/forget?name=s0"


def fill(store: Store) -> None:
    """Two conversations; version 2 trained on the second one, and version 3 follows it."""
    first = said(0, None)
    second = said(1, first)
    other = said(2, None)
    record(store, first, second, other, said(3, other))
    judge(store, first.id, second)
    for number in (1, 2, 3):
        batch = None
        if number == 2:
            store.training.hold_out("main", lambda _: False)
            store.training.lease_samples("main", 1, "b", scored=True, hinted=True)
            batch = "b"
        path = version_path(store.dir, "main", number)
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256 = write_weights(path)
        state = VersionState.CANDIDATE
        version = PolicyVersion("main", number, number - 1, str(path), sha256, 1, state)
        store.versions.add(version, batch)
        assert store.versions.set_serving("main", number)


def test_the_page_names_what_will_go_and_asking_changes_nothing(
    store: Store, tmp_path: Path
) -> None:
    fill(store)

    async def test(site: Site) -> None:
        shown = words(await site.get(TURN))
        assert "1 turn:" in shown
        assert "what followed 1 turn before them" in shown
        assert "versions 2, 3 of main" in shown
        assert "cannot be undone" in shown
        assert "ask<1>" in shown
        assert "2 turns:" in words(await site.get(SESSION))
        assert "no version: none trained on them" in words(
            await site.get("/page/turns/turn_3/forget")
        )
        assert len(store.turns.ids()) == 4

    on_site(test, store, tmp_path)


def test_what_was_confirmed_goes_with_the_versions_that_learned_from_it(
    store: Store, tmp_path: Path
) -> None:
    fill(store)

    async def test(site: Site) -> None:
        done = words(await site.submit(SESSION, SESSION))
        assert "forgot 2 turns" in done
        assert "withdrew versions 2, 3 of main; version 1 serves" in done, done
        assert "ask<0>" not in done
        assert store.turns.ids() == ["turn_2", "turn_3"]
        assert store.versions.serving("main").number == 1
        assert not version_path(store.dir, "main", 2).exists()
        await site.get(SESSION, 404)
        await site.get(TURN, 404)

    on_site(test, store, tmp_path)


def test_while_an_update_uses_a_turn_there_is_no_button_and_the_form_is_refused(
    store: Store, tmp_path: Path
) -> None:
    fill(store)
    judge(store, "turn_2", said(3, said(2, None)))
    store.training.lease_samples("main", 1, "now", scored=True, hinted=True)

    async def test(site: Site) -> None:
        shown = await site.get("/page/turns/turn_2/forget")
        assert "An update uses 1 of these turns" in shown
        assert "Forget for good" not in shown
        form = "/page/turns/turn_2/forget"
        assert "an update uses 1" in await site.submit("/page/turns/turn_3", form, 409)
        assert store.turns.get("turn_2") is not None

    on_site(test, store, tmp_path)


def test_another_lineages_turns_are_not_there_to_forget(store: Store, tmp_path: Path) -> None:
    fill(store)

    async def test(site: Site) -> None:
        await site.post("/page/login", {"key": "alice's"})
        for path in (TURN, SESSION):
            await site.get(path, 404)
            await site.submit("/page/versions/alice/0/rollback", path, 404)
        assert len(store.turns.ids()) == 4

    access = {"alice": Access(model="alice", key="alice's")}
    on_site(test, store, tmp_path, "the-proxy-key", access)
