"""What each page shows, over real HTTP on a real store."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextstate.app.page.home import answer, scores, turns_a_day
from nextstate.records import Feedback, JudgedTurn, PolicyVersion, TurnKind, VersionState
from nextstate.store import Store
from nextstate.store.shares import OWNER
from proxy.lineages import Access
from tests.page.running_page import Site, on_site, words
from tests.proxy.running_proxy import add_version
from tests.store.test_records import add, judge, turn


def rejected(number: int) -> PolicyVersion:
    return PolicyVersion(
        "main", number, 0, None, None, 16, VersionState.REJECTED, {"step/kl": 0.5}, "too far"
    )


def test_the_first_page_of_an_empty_store_says_what_to_do(store: Store, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        found = words(await site.get("/"))
        assert "Nothing can be said yet: no turn has been judged." in found
        assert "0 judged turns are ready; an update takes 16." in found
        assert "no labels yet" in found
        assert "What is wrong now" not in found

    on_site(test, store, tmp_path)


def test_the_first_page_shows_scores_changes_waits_and_the_judge(
    store: Store, tmp_path: Path
) -> None:
    for number in range(3):
        add(store, turn(number))
        judge(store, number, 1)
    store.reviewing.give(Feedback("turn_0", -1), OWNER)
    store.versions.add(rejected(1), None)

    async def test(site: Site) -> None:
        page = await site.get("/")
        found = words(page)
        assert "version 0: +0.33, 3 judged turns in 1 sessions" in found
        assert "3 judged turns are ready" in found
        assert "rules agrees with you on 0 of 1 turns" in found
        assert "v1 rejected" in found
        assert "16 turns: too far" in found
        assert 'class="point unsure"' in page

    on_site(test, store, tmp_path)


def test_the_first_page_says_who_chose_the_version_that_serves(
    store: Store, tmp_path: Path
) -> None:
    for number in (1, 2):
        made = PolicyVersion("main", number, number - 1, "/a", "ff", 1, VersionState.CANDIDATE)
        store.versions.add(made, None)
        assert store.versions.serve_candidate(made)

    async def test(site: Site) -> None:
        assert "by choice of" not in words(await site.get("/"))
        store.versions.set_serving("main", 1, "ana <b>")
        page = await site.get("/")
        assert "by choice of ana &lt;b&gt;, " in page
        made = PolicyVersion("main", 3, 1, "/c", "fe", 1, VersionState.CANDIDATE)
        store.versions.add(made, None)
        assert store.versions.serve_candidate(made)
        assert "by choice of" not in words(await site.get("/"))

    on_site(test, store, tmp_path)


def test_what_is_wrong_is_said_first(store: Store, tmp_path: Path) -> None:
    folder = store.dir / "learner" / "main"
    folder.mkdir(parents=True)
    (folder / "problem").write_text("drift <b>too</b> large")

    async def test(site: Site) -> None:
        page = await site.get("/")
        assert "What is wrong now" in page
        assert "The learner: drift &lt;b&gt;too&lt;/b&gt; large" in page

    on_site(test, store, tmp_path)


def judged(version: int, score: int, sessions: int = 8) -> list[JudgedTurn]:
    return [JudgedTurn(f"s{n}", version, score if n else 0) for n in range(sessions)]


def test_the_answer_says_no_more_than_the_intervals_do() -> None:
    assert answer([]).startswith("Nothing can be said yet")
    assert answer(scores(judged(0, -1))).startswith("Too early")
    assert answer(scores(judged(0, -1) + judged(3, 1, 7))).startswith("Too early")
    assert answer(scores(judged(0, -1) + judged(3, 1))).startswith("It looks so")
    assert answer(scores(judged(0, 1) + judged(3, -1))).startswith("No: the score fell")
    assert answer(scores(judged(0, 1) + judged(3, 1))).startswith("Not clear yet")


def test_the_same_score_everywhere_is_not_certain() -> None:
    (found,) = scores([JudgedTurn(str(n), 0, 1) for n in range(8)])
    assert found.high == found.value == 1.0
    assert found.low is not None
    assert 0 < found.low < 0.7


def test_turns_of_one_session_count_once_in_a_score() -> None:
    turns = [JudgedTurn("long", 0, -1)] * 9 + [JudgedTurn("short", 0, 1)]
    (found,) = scores(turns)
    assert (found.value, found.turns, found.sessions, found.low) == (0.0, 10, 2, None)


def test_turns_a_day_end_today(store: Store) -> None:
    add(store, turn(0, id=f"turn_{1_700_000_000_000:012x}00000000"))
    days = turns_a_day(store, 1_700_000_000.0)
    assert len(days) == 14
    assert [count for _, count in days] == [0] * 13 + [1]


def test_the_list_shows_who_said_what_and_what_became_of_it(store: Store, tmp_path: Path) -> None:
    add(store, turn(0, request={"messages": [{"role": "user", "content": "Where is it?"}]}))
    judge(store, 0, -1)
    add(store, turn(1, untrainable="the client sent no ids"), next_state=None)
    add(store, turn(2, session="other", kind=TurnKind.SIDE, policy_version=4), next_state=None)

    async def test(site: Site) -> None:
        found = words(await site.get("/page/turns"))
        assert "user Where is it? model answer then user thanks votes -1 ready to train" in found
        assert "cannot train: the client sent no ids" in found
        assert "a side turn" in found
        assert "Where is it?" not in words(await site.get("/page/turns?session=other"))
        assert "a side turn" in words(await site.get("/page/turns?version=4"))
        found = words(await site.get("/page/turns?untrained=1"))
        assert "the client sent no ids" in found
        assert "Where is it?" not in found
        await site.get("/page/turns?version=x", 400)

    on_site(test, store, tmp_path)


def test_the_list_has_pages(store: Store, tmp_path: Path) -> None:
    for number in range(30):
        text = f"question {number:02}"
        request = {"messages": [{"role": "user", "content": text}]}
        add(store, turn(number, request=request), next_state=None)

    async def test(site: Site) -> None:
        first = await site.get("/page/turns")
        assert "question 29" in first
        assert "question 04" not in first
        older = first.split('rel="next" href="')[1].split('"')[0].replace("&amp;", "&")
        second = await site.get(older)
        assert "question 04" in second
        assert "question 05" not in second
        assert "Newest" in second

    on_site(test, store, tmp_path)


def test_a_turn_shows_its_conversation_verdict_and_measurements(
    store: Store, tmp_path: Path
) -> None:
    call = {"id": "c", "function": {"name": "exec", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "You are careful."},
        {"role": "user", "content": [{"type": "text", "text": "Look!"}, {"type": "image_url"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "total 48"},
    ]
    add(store, turn(0, request={"messages": messages}, parent="turn_9"))
    judge(store, 0, -1, "Be brief.")

    async def test(site: Site) -> None:
        page = await site.get("/page/turns/turn_0")
        found = words(page)
        for text in (
            *("You are careful.", "Look! [image_url]", '[tool call] {"name":"exec"'),
            *("total 48", "reply answer", "user thanks", "by rules, votes -1", "Hint: Be brief."),
            *("3 tokens", "2 tokens", "-0.150 nats a token", "ready to train"),
        ):
            assert text in found
        assert 'href="/page/turns/turn_9"' in page
        await site.get("/page/turns/turn_9", 404)

    on_site(test, store, tmp_path)


def test_a_long_conversation_and_a_huge_text_are_cut_with_a_way_to_the_rest(
    store: Store, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": f"message {number:03}."} for number in range(70)]
    huge = "x" * 1_000_000 + "END"
    add(store, turn(0, request={"messages": messages}, reply={"content": huge}), next_state=None)

    async def test(site: Site) -> None:
        page = await site.get("/page/turns/turn_0")
        assert len(page) < 50_000
        assert "message 040." in page
        assert "message 039." not in page
        assert "994003 more characters" in page
        assert (await site.get("/page/turns/turn_0/text/reply")).endswith("xEND")
        assert "message 039." in await site.get("/page/turns/turn_0?before=40")
        assert await site.get("/page/turns/turn_0/text/m3") == "message 003."
        await site.get("/page/turns/turn_0/text/m70", 404)
        await site.get("/page/turns/turn_0/text/s0", 404)

    on_site(test, store, tmp_path)


def test_versions_show_lineage_gate_and_the_turns_that_made_them(
    store: Store, tmp_path: Path
) -> None:
    add(store, turn(0))
    judge(store, 0, -1, "Be brief.")
    name = "batch"
    assert store.training.lease_samples("main", 1, name, scored=True, hinted=False)
    metrics = {"score/mean": -1.0, "gate/kl_base": 0.25}
    made = PolicyVersion("main", 1, 0, "/a", "ff", 1, VersionState.CANDIDATE, metrics)
    store.versions.add(made, name)
    store.versions.add(rejected(2), None)

    async def test(site: Site) -> None:
        found = words(await site.get("/page/versions"))
        assert "Version v0 serves." in found
        assert "v2 rejected" in found
        assert "v2: too far" in found
        found = words(await site.get("/page/versions/main/1"))
        assert "candidate made" in found
        assert "gate/kl_base 0.25" in found
        assert "turn_0 −1 bad Be brief." in found
        assert "trained in version 1" in words(await site.get("/page/turns/turn_0"))
        assert "It cannot serve" in words(await site.get("/page/versions/main/2"))
        await site.get("/page/versions/main/7", 404)
        await site.get("/page/versions/nobody/1", 404)
        assert "rejected" not in words(await site.get("/page/versions?before=2"))

    on_site(test, store, tmp_path)


def test_feedback_with_a_hint_decides(store: Store, tmp_path: Path) -> None:
    add(store, turn(0))

    async def test(site: Site) -> None:
        page, path = "/page/turns/turn_0", "/page/turns/turn_0/feedback"
        assert "Kept: -1." in await site.submit(page, path, score="-1", hint=" Be\r\nbrief. ")
        assert store.judging.feedback("turn_0") == Feedback("turn_0", -1, "Be\nbrief.")
        assert "A person said: −1 bad Be brief." in words(await site.get(page))
        await site.submit(page, path, 400, score="2")
        assert "1001 characters" in await site.submit(page, path, 400, score="1", hint="x" * 1001)
        assert store.judging.feedback("turn_0") == Feedback("turn_0", -1, "Be\nbrief.")

    on_site(test, store, tmp_path)


def test_a_rollback_is_confirmed_on_a_page_and_loads_the_adapter(
    store: Store, tmp_path: Path
) -> None:
    version = add_version(store, tmp_path, 1)

    async def test(site: Site) -> None:
        page = "/page/versions/main/1/rollback"
        assert f'href="{page}"' in await site.get("/page/versions/main/1")
        assert "in place of version 0" in words(await site.get(page))
        assert store.versions.serving("main").number == 0
        assert "Version 1 serves main now." in await site.submit(page, page)
        assert store.versions.serving("main").number == 1
        assert version.adapter_name in site.engine.adapters
        assert "serves main already" in words(await site.get(page))

    on_site(test, store, tmp_path)


def test_a_version_without_an_adapter_is_not_served(store: Store, tmp_path: Path) -> None:
    store.versions.add(rejected(1), None)

    async def test(site: Site) -> None:
        page = "/page/versions/main/1/rollback"
        token_of = "/page/lineages/main/resume"
        assert "cannot serve" in await site.get(page)
        add(store, turn(0))
        assert "has no adapter" in await site.submit("/page/turns/turn_0", page, 409)
        assert "It is not paused." in await site.get(token_of)

    on_site(test, store, tmp_path)


def test_a_paused_lineage_goes_on_after_a_confirmation(store: Store, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        store.versions.add(rejected(number), None)

    async def test(site: Site) -> None:
        page = "/page/lineages/main/resume"
        assert f'href="{page}"' in await site.get("/")
        assert f'href="{page}"' in await site.get("/page/versions")
        assert "trains again" in await site.submit(page, page)
        assert store.versions.decisions("main").after == 3
        assert f'href="{page}"' not in await site.get("/")

    on_site(test, store, tmp_path)


def test_a_persons_pause_is_named_and_ended_too(store: Store, tmp_path: Path) -> None:
    store.versions.pause("main", "ann")

    async def test(site: Site) -> None:
        page = "/page/lineages/main/resume"
        assert f'href="{page}"' in await site.get("/")
        assert "Training is paused. ann paused it." in words(await site.get("/page/versions"))
        assert "trains again" in await site.submit(page, page)
        assert store.versions.decisions("main").pause is None
        assert "It is not paused." in await site.get(page)

    on_site(test, store, tmp_path)


@pytest.mark.parametrize("path", ["/page/nothing", "/page/turns/a/b", "/page/style.css/x"])
def test_an_unknown_page_is_a_404_in_words(store: Store, tmp_path: Path, path: str) -> None:
    async def test(site: Site) -> None:
        assert "There is no such page." in await site.get(path, 404)

    on_site(test, store, tmp_path)


def test_a_key_shows_only_its_own_lineage(store: Store, tmp_path: Path) -> None:
    add(store, turn(0), turn(1, lineage="alice"))
    access = {"alice": Access(None, "alice-key"), "bob": Access("bob", None)}

    async def test(site: Site) -> None:
        await site.post("/page/login", {"key": "alice-key"})
        found = await site.get("/page/turns")
        assert "/page/turns/turn_1" in found
        assert "/page/turns/turn_0" not in found
        for path in ("/page/turns/turn_0", "/page/versions?lineage=main", "/?lineage=bob"):
            await site.get(path, 404)
        for path in ("/page/turns/turn_0/text/reply", "/page/versions/main/0"):
            await site.get(path, 404)
        page = "/page/turns/turn_1"
        await site.submit(page, "/page/turns/turn_0/feedback", 404, score="1")
        await site.submit(page, "/page/versions/main/0/rollback", 404)
        await site.submit(page, "/page/lineages/main/resume", 404)

    on_site(test, store, tmp_path, "main-key", access)


def test_the_turns_of_a_version_are_those_of_its_lineage(store: Store, tmp_path: Path) -> None:
    add(store, turn(0), turn(1, lineage="alice"))
    access = {"alice": Access(None, None)}

    async def test(site: Site) -> None:
        card = await site.get("/page/versions/alice/0")
        address = "/page/turns?lineage=alice&amp;version=0"
        assert address in card
        found = await site.get(address.replace("&amp;", "&"))
        assert "/page/turns/turn_1" in found
        assert "/page/turns/turn_0" not in found
        await site.get("/page/turns?lineage=nobody", 404)

    on_site(test, store, tmp_path, None, access)


def test_the_base_that_serves_a_new_store_is_not_called_retired(
    store: Store, tmp_path: Path
) -> None:
    async def test(site: Site) -> None:
        for page in ("/page/versions", "/page/versions/main/0"):
            assert "retired" not in words(await site.get(page))
        assert "There is no version before 0." in words(await site.get("/page/versions?before=0"))

    on_site(test, store, tmp_path)


@pytest.mark.parametrize("prompt", ["Once upon", ["Once ", "upon"], [1, 2]], ids=str)
def test_a_turn_of_the_completions_route_shows_its_prompt(
    prompt: object, store: Store, tmp_path: Path
) -> None:
    add(store, turn(0, request={"prompt": prompt}))

    async def test(site: Site) -> None:
        found = words(await site.get("/page/turns/turn_0"))
        assert ("Once" if "Once" in str(prompt) else "[1, 2]") in found

    on_site(test, store, tmp_path)
