"""What people look at in the store: newest first, filtered, and bounded in cost."""

from __future__ import annotations

from nextstate.records import TurnKind
from nextstate.store import Store
from nextstate.store.browsing import LOOKED_THROUGH, Wanted
from tests.store.test_records import add, judge, turn

MAIN = Wanted(("main",))


def numbers(store: Store, wanted: Wanted = MAIN, limit: int = 2) -> list[list[int]]:
    """The numbers of the turns of every page."""
    found = [store.browsing.turns(wanted, limit)]
    while found[-1].older is not None and len(found) < 2000:
        found.append(store.browsing.turns(wanted, limit, found[-1].older))
    return [[int(one.id.removeprefix("turn_")) for one in page.turns] for page in found]


def everything(store: Store, wanted: Wanted = MAIN) -> list[int]:
    return [number for page in numbers(store, wanted) for number in page]


def test_turns_come_newest_first_page_by_page(store: Store) -> None:
    add(store, *(turn(number) for number in range(5)))
    assert numbers(store) == [[4, 3], [2, 1], [0]]
    assert numbers(store, Wanted(("main",), session="s")) == [[4, 3], [2, 1], [0]]


def test_filters_leave_out_what_is_not_wanted(store: Store) -> None:
    add(
        store,
        turn(0, policy_version=1),
        turn(1, untrainable="no ids"),
        turn(2, session="other"),
        turn(3, lineage="alice"),
    )
    assert everything(store) == [2, 1, 0]
    assert everything(store, Wanted(("main", "alice"))) == [3, 2, 1, 0]
    assert everything(store, Wanted(("main",), version=1)) == [0]
    assert everything(store, Wanted(("main",), untrained=True)) == [1]
    assert everything(store, Wanted(("main",), session="other")) == [2]
    assert everything(store, Wanted(("main",), session="none")) == []


def test_a_search_that_finds_nothing_stops_and_can_go_on(store: Store) -> None:
    add(store, turn(0, untrainable="no ids"), next_state=None)
    add(store, *(turn(number) for number in range(1, LOOKED_THROUGH + 1)), next_state=None)
    wanted = Wanted(("main",), untrained=True)
    first = store.browsing.turns(wanted, 10)
    assert first.turns == ()
    assert first.older is not None
    assert [one.id for one in store.browsing.turns(wanted, 10, first.older).turns] == ["turn_0"]


def test_a_glimpse_has_the_ends_of_a_long_request_and_what_followed(store: Store) -> None:
    messages = [{"role": "user", "content": str(number)} for number in range(20)]
    add(store, turn(0, request={"messages": messages}, kind=TurnKind.SIDE))
    assert judge(store, 0, -1, "Be brief.")
    (found,) = store.browsing.turns(MAIN, 1).turns
    shown = [message["content"] for message in found.messages]
    assert shown == ["0", "1", "14", "15", "16", "17", "18", "19"]
    assert (found.reply["content"], found.score, found.judge) == ("answer", -1, "rules")
    assert [state.text for state in found.next_states] == ["thanks"]
    assert found.fate == store.browsing.fate("turn_0")


def test_turns_are_counted_by_the_times_in_their_names(store: Store) -> None:
    times = (10.0, 11.0, 11.5, 30.0)
    names = [f"turn_{int(1000 * at):012x}00000000" for at in times]
    add(store, *(turn(number, id=name) for number, name in enumerate(names)), next_state=None)
    assert store.browsing.recorded([0.0, 11.0, 20.0, 40.0]) == [1, 2, 1]
    assert store.browsing.recorded([40.0, 50.0]) == [0]
