"""Sessions as conversations, and episodes with their steps, rewards and screenshots."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nextstate.app.page.episodes import MOST_BYTES
from nextstate.episodes import Episode, EpisodeStatus, Reward, RewardKind
from nextstate.store import Store
from proxy.lineages import Access
from tests.page.running_page import Site, on_site, png, words
from tests.store.test_records import add, judge, turn


def names(page: str) -> list[str]:
    """The sessions or episodes that a list links to, in its order."""
    rows = page.split('<th scope="row"')[1:]
    return [row.split("</a>")[0].rsplit(">", 1)[1] for row in rows]


def older(page: str) -> str | None:
    """The address of the next page of a list."""
    parts = page.split('rel="next" href="')
    return None if len(parts) == 1 else parts[1].split('"')[0].replace("&amp;", "&")


def test_sessions_are_listed_once_each_that_with_the_newest_turn_first(
    store: Store, tmp_path: Path
) -> None:
    add(store, *(turn(number, session=f"s{number % 60:02}") for number in range(120)))
    judge(store, 119, 1)
    add(store, turn(200, session="s30"), turn(201, session="hers", lineage="alice"))

    async def test(site: Site) -> None:
        page = await site.get("/page/sessions")
        assert "s59 2 +1.00" in words(page)
        found, path = names(page), older(page)
        while path is not None:
            page = await site.get(path)
            found, path = found + names(page), older(page)
        assert found == ["s30", *(f"s{n:02}" for n in reversed(range(60)) if n != 30)]
        assert "Newest" in page
        await site.get("/page/sessions?before=x", 400)

    on_site(test, store, tmp_path)


def test_a_session_is_shown_as_a_conversation_oldest_first(store: Store, tmp_path: Path) -> None:
    for number in range(30):
        text = f"question {number:02}"
        request = {"messages": [{"role": "user", "content": text}]}
        add(store, turn(number, request=request, session="a/b c"), next_state="then this")
    judge(store, 29, -1, "Be brief.")
    add(store, turn(40, session="hers", lineage="alice"))

    async def test(site: Site) -> None:
        page = await site.get("/page/session?name=a%2Fb%20c")
        found = words(page)
        assert "30 turns of main" in found
        assert "question 04" not in found
        assert found.index("question 05") < found.index("question 29")
        assert "−1 bad v0 ready to train votes -1 · hint: Be brief. user then this" in found
        assert found.count("then this") == 1  # earlier ones are what was asked next
        earlier = page.split('<a href="/page/session?')[1].split('"')[0].replace("&amp;", "&")
        found = words(await site.get(f"/page/session?{earlier}"))
        assert "question 04" in found
        assert "question 05" not in found
        assert "To its end" in found
        for name in ("hers", "nobody", ""):
            await site.get(f"/page/session?name={name}", 404)
        await site.get("/page/session?name=a%2Fb%20c&before=turn_x", 404)
        await site.get("/page/session?name=a%2Fb%20c&before=%00", 400)

    on_site(test, store, tmp_path)


def attempt(store: Store, name: str, outcome: float | None, lineage: str = "main") -> None:
    store.episodes.open([Episode(name, lineage, "words", "Find the word.", max_calls=40)], None)
    for step in range(30):
        told = f"{name}.{step}"
        values = {"id": told, "session": name, "episode": name, "step": step, "lineage": lineage}
        add(store, turn(step, **values), next_state=f"observation {step:02}")
    rewards = [Reward(name, "progress", RewardKind.PROCESS, 0.5, f"{name}.1", "checker")]
    store.episodes.reward(rewards)
    if outcome is not None:
        store.episodes.close(name, EpisodeStatus.DONE, outcome, None)


def test_episodes_are_filtered_by_environment_and_outcome(store: Store, tmp_path: Path) -> None:
    for number, outcome in enumerate((1.0, 0.0, None)):
        attempt(store, f"e-{number}", outcome)
    attempt(store, "hers", 1.0, "alice")
    many = [Episode(f"shell-{number:02}", "main", "shell", "List.") for number in range(30)]
    store.episodes.open(many, None)

    async def test(site: Site) -> None:
        for query, expected in (
            ("environment=words", ["e-2", "e-1", "e-0"]),
            ("outcome=solved", ["e-0"]),
            ("outcome=failed", ["e-1"]),
            ("environment=words&outcome=none", ["e-2"]),
            ("environment=nothing", []),
        ):
            assert names(await site.get(f"/page/episodes?{query}")) == expected, query
        page = await site.get("/page/episodes?environment=shell")
        found, path = names(page), older(page)
        assert path is not None
        found += names(await site.get(path))
        assert sorted(found) == [f"shell-{number:02}" for number in range(30)]
        await site.get("/page/episodes?outcome=best", 400)
        await site.get("/page/episodes?before=hers", 404)
        await site.get("/page/episodes/hers", 404)

    on_site(test, store, tmp_path)


def test_an_episode_shows_steps_rewards_and_screenshots(store: Store, tmp_path: Path) -> None:
    attempt(store, "e-1", 0.25)
    folder = store.dir / "pictures" / "e-1"
    folder.mkdir(parents=True)
    picture = png(4, 4, (9, 9, 9))
    (folder / "1.png").write_bytes(picture)

    async def test(site: Site) -> None:
        page = await site.get("/page/episodes/e-1")
        found = words(page)
        for text in (
            *("closed outcome 0.25", "Find the word.", "0 of 40", "1 to 25 of 30"),
            *("step 1 not judged v0 progress +0.5", "then user observation 24"),
        ):
            assert text in found, text
        assert page.count("<img") == 1
        path = "/page/episodes/e-1/pictures/1"
        assert f'src="{path}" alt="The screen at step 1"' in page
        answer = await site.http.get(site.url + path)
        assert (answer.status, await answer.read()) == (200, picture)
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        await site.get("/page/episodes/e-1/pictures/2", 404)
        (folder / "3.jpg").write_bytes(b"\xff\xd8\xff\xe0 a picture")
        answer = await site.http.get(f"{site.url}/page/episodes/e-1/pictures/3")
        assert answer.headers["Content-Type"] == "image/jpeg"
        assert (await answer.read()).endswith(b"a picture")
        (folder / "4.jpg").write_bytes(picture)  # the name says another kind
        await site.get("/page/episodes/e-1/pictures/4", 404)
        assert "26 to 30 of 30" in words(await site.get("/page/episodes/e-1?from=25"))
        assert "It has not called" in words(await site.get("/page/episodes/e-1?from=99"))

    on_site(test, store, tmp_path)


def large(file: Path) -> None:
    file.write_bytes(png(1, 1, (0, 0, 0)))
    os.truncate(file, MOST_BYTES + 1)


def link(file: Path) -> None:
    other = file.parents[2] / "other.png"
    other.write_bytes(png(1, 1, (0, 0, 0)))
    file.symlink_to(other)


def linked_folder(file: Path) -> None:
    file.parent.rename(file.parents[2] / "elsewhere")
    file.parent.symlink_to(file.parents[2] / "elsewhere")
    file.write_bytes(png(1, 1, (0, 0, 0)))


@pytest.mark.parametrize(
    "make",
    [
        large,
        link,
        linked_folder,
        Path.mkdir,
        lambda file: file.write_text("<svg onload=alert(1)>"),
        lambda file: os.mkfifo(file),
    ],
)
def test_what_is_no_picture_of_the_episode_is_not_sent(
    store: Store, tmp_path: Path, make: object
) -> None:
    attempt(store, "e-1", None)
    file = store.dir / "pictures" / "e-1" / "0.png"
    file.parent.mkdir(parents=True)
    make(file)  # pyright: ignore[reportCallIssue]

    async def test(site: Site) -> None:
        await site.get("/page/episodes/e-1/pictures/0", 404)

    on_site(test, store, tmp_path)


def test_another_lineages_key_sees_none_of_it(store: Store, tmp_path: Path) -> None:
    attempt(store, "e-1", 1.0)
    add(store, turn(1000, session="s", lineage="alice"))
    (store.dir / "pictures" / "e-1").mkdir(parents=True)
    (store.dir / "pictures" / "e-1" / "0.png").write_bytes(png(1, 1, (0, 0, 0)))

    async def test(site: Site) -> None:
        await site.post("/page/login", {"key": "alice-key"})
        assert names(await site.get("/page/sessions")) == ["s"]
        assert names(await site.get("/page/episodes")) == []
        for path in ("/page/session?name=e-1", "/page/episodes/e-1"):
            await site.get(path, 404)
        for path in ("/page/episodes/e-1/pictures/0", "/page/lineages/main/pause"):
            await site.get(path, 404)
        await site.get("/page/running?lineage=main", 404)
        await site.get("/page/export?lineage=main&what=sft", 404)
        page = "/page/turns/turn_1000"
        await site.submit(page, "/page/lineages/main/pause", 404)
        assert store.versions.decisions("main").pause is None

    on_site(test, store, tmp_path, "main-key", {"alice": Access(None, "alice-key")})
