"""What people look at in the store: newest first, filtered, and bounded in cost."""

from __future__ import annotations

from nextstate.app.finding import newest
from nextstate.records import TurnKind
from nextstate.store import Store
from nextstate.store.lookup import PAGE, Choice
from tests.store.test_records import add, judge, turn

MAIN = Choice(lineages=("main",))


def numbers(store: Store, choice: Choice = MAIN, limit: int = 2) -> list[list[int]]:
    """The numbers of the turns of every page."""
    found = [store.lookup.page(choice, limit=limit)]
    while found[-1].next is not None and len(found) < 2000:
        found.append(store.lookup.page(choice, found[-1].next, limit=limit))
    return [[int(one.id.removeprefix("turn_")) for one in page.turns] for page in found]


def everything(store: Store, choice: Choice = MAIN) -> list[int]:
    return [number for page in numbers(store, choice) for number in page]


def test_turns_come_newest_first_page_by_page(store: Store) -> None:
    add(store, *(turn(number) for number in range(5)))
    assert numbers(store) == [[4, 3], [2, 1], [0]]
    assert numbers(store, Choice(("s",), ("main",))) == [[4, 3], [2, 1], [0]]


def test_filters_leave_out_what_is_not_wanted(store: Store) -> None:
    add(
        store,
        turn(0, policy_version=1),
        turn(1, untrainable="no ids"),
        turn(2, session="other"),
        turn(3, lineage="alice"),
    )
    assert everything(store) == [2, 1, 0]
    assert everything(store, Choice()) == [3, 2, 1, 0]
    assert everything(store, Choice(lineages=("main", "alice"))) == [3, 2, 1, 0]
    assert everything(store, Choice(lineages=())) == []
    assert everything(store, Choice(lineages=("main",), version=1)) == [0]
    assert everything(store, Choice(lineages=("main",), untrained=True)) == [1]
    assert everything(store, Choice(("other",), ("main",))) == [2]
    assert everything(store, Choice(("none",), ("main",))) == []


def test_a_search_that_finds_nothing_stops_and_can_go_on(store: Store) -> None:
    add(store, turn(0, untrainable="no ids"), next_state=None)
    add(store, *(turn(number) for number in range(1, 5 * PAGE + 1)), next_state=None)
    wanted = Choice(lineages=("main",), untrained=True)
    first = newest(store, wanted, 10, most=5 * PAGE)
    assert (first.turns, first.before, first.gave_up) == ([], "turn_1", True)
    assert [one.id for one in newest(store, wanted, 10, first.before).turns] == ["turn_0"]


def test_a_summary_has_the_ends_of_a_long_request_and_what_followed(store: Store) -> None:
    messages = [{"role": "user", "content": str(number)} for number in range(20)]
    add(store, turn(0, request={"messages": messages}, kind=TurnKind.SIDE))
    assert judge(store, 0, -1, "Be brief.")
    (found,) = store.lookup.page(MAIN).turns
    assert [message["content"] for message in found.messages] == ["0", "19"]
    assert (found.reply["content"], found.score) == ("answer", -1)
    assert [state.text for state in found.followed] == ["thanks"]
    standing = store.lookup.standing("turn_0")
    assert standing is not None
    assert found.fate == standing.fate is not None


def test_turns_are_counted_by_the_times_in_their_names(store: Store) -> None:
    times = (10.0, 11.0, 11.5, 30.0)
    names = [f"turn_{int(1000 * at):012x}00000000" for at in times]
    add(store, *(turn(number, id=name) for number, name in enumerate(names)), next_state=None)
    assert store.lookup.recorded([0.0, 11.0, 20.0, 40.0]) == [1, 2, 1]
    assert store.lookup.recorded([40.0, 50.0]) == [0]
