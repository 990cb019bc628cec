"""`/v1/episodes` and its like: environments open episodes, reward them, close and read them.

`/v1/groups` opens several at once, and `/v1/exams` is for who examines candidates by episodes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from typing import TypeVar, cast

from aiohttp import web

from nextstate.config import nearest
from nextstate.episodes import (
    MOST_REWARDS,
    NEVER_TRAIN,
    Episode,
    EpisodeStatus,
    Reward,
    RewardKind,
    Split,
    check_finite,
    check_label,
    is_label,
)
from nextstate.errors import NoEpisodeError, RecordError
from nextstate.exams import Exam
from nextstate.records import Json, VersionState, new_id
from nextstate.redaction import NOTHING, Redactor
from nextstate.store import Store
from nextstate.store.episode_rows import Shown
from nextstate.store.episodes import Named
from nextstate.store.examiners import HELD_S
from nextstate.traces import training_trace
from nextstate.wire import read_json, write_json
from proxy.answers import Refused
from proxy.bodies import read_body
from proxy.episode_calls import UNRECORDED_EPISODE, EpisodeCalls, in_store
from proxy.episode_schema import (
    CLOSE,
    DESCRIPTION,
    EXAM,
    KINDS,
    MOST_EXAM_TASKS,
    MOST_IN_GROUP,
    MOST_METADATA_BYTES,
    MOST_OBSERVATION,
    OPEN,
    OPEN_GROUP,
    REWARD,
    Field,
    openapi,
)
from proxy.keys import GRANT, sent_key
from proxy.lineages import CALLER, Lineages
from proxy.paths import EPISODES
from proxy.recorder import Recorder
from proxy.versions import Versions

log = logging.getLogger(__name__)

_Choice = TypeVar("_Choice", bound=StrEnum)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class EpisodeRoutes:
    """Serves the episodes of one store. Every method raises Refused."""

    def __init__(
        self,
        store: Store,
        lineages: Lineages,
        recorder: Recorder,
        calls: EpisodeCalls,
        versions: Versions,
        max_body_mb: int,
        wait_s: float,
        redactor: Redactor = NOTHING,
    ) -> None:
        self._store = store
        self._lineages = lineages
        self._recorder = recorder
        self._calls = calls
        self._versions = versions
        self._max_body_mb = max_body_mb
        self._wait_s = wait_s
        self._redactor = redactor

    def routes_of_one(self, path: str) -> Mapping[str, Handler]:
        """The handlers of a path below `/v1/episodes/`, by method."""
        _, name, *rest = path.removeprefix(EPISODES).rstrip("/").split("/")
        routes: dict[str, dict[str, Callable[..., Awaitable[web.StreamResponse]]]] = {
            "": {"GET": self._get},
            "trace": {"GET": self._trace},
            "rewards": {"POST": self._reward},
            "close": {"POST": self._close},
        }
        if name == DESCRIPTION and not rest:
            return {"GET": _describe}
        found = routes.get("/".join(rest))
        if found is None:
            known = ", ".join(f"{EPISODES}/{{id}}/{route}".rstrip("/") for route in routes)
            raise Refused(404, f"There is no {path[:200]}: known are {known}.")
        return {method: partial(handler, name) for method, handler in found.items()}

    async def open(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/episodes`: opens one, or finds the same one that is open."""
        asked = await self._asked(request, OPEN)
        name = self._kept(asked.get("episode", new_id("episode")))
        if "group" in asked:
            asked["group"] = self._kept(asked["group"])
        episode = self._episode(request, asked, name)
        (opened,) = await self._open_all(request, [episode], asked.get("group_size"))
        return web.json_response(opened)

    async def open_group(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/groups`: opens `group_size` episodes of one task, or none."""
        asked = await self._asked(request, OPEN_GROUP)
        asked["group"] = self._kept(asked.get("group", new_id("group")))
        size = asked.get("group_size") or 0
        ids = [f"{asked['group']}-{number}" for number in range(min(size, MOST_IN_GROUP))]
        episodes = [self._episode(request, asked, name) for name in ids]
        if not episodes:
            raise Refused(400, f"group_size is missing: expected 1 to {MOST_IN_GROUP}.")
        opened = await self._open_all(request, episodes, size)
        return web.json_response({"group": asked["group"], "episodes": opened})

    async def hold_exams(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/exams`: holds a lineage's exams, and answers with the one that is due.

        Counts the episodes that have been played in it, for the learner.
        """
        if not self._recorder.enabled:
            raise Refused(409, UNRECORDED_EPISODE)
        asked = await self._asked(request, EXAM)
        holder = self._kept(asked.get("holder", "unnamed"))
        with _Checked():
            check_label("holder", holder)
            lineage = self._lineage(request, asked)
            if (planned := asked.get("tasks")) is None:
                raise RecordError(f"tasks is missing: expected 1 to {MOST_EXAM_TASKS}")
            if not 1 <= planned <= MOST_EXAM_TASKS:
                raise RecordError(f"tasks = {planned!s:.80}: expected 1 to {MOST_EXAM_TASKS}")
        held_by = await in_store(self._store.examiners.hold, lineage, f"program {holder}")
        if held_by != f"program {holder}":
            raise Refused(
                409,
                f"{held_by} holds the exams of lineage {lineage!r}: end it, or wait until it has "
                f"said nothing for {HELD_S:g} s.",
            )
        exam, numbers = Exam(), [None, None]
        for newest in await in_store(self._store.versions.newest, lineage, 1):
            if newest.state is VersionState.CANDIDATE and not newest.is_whole_model:
                exam = await in_store(self._store.examiners.count, newest, planned)
                numbers = [newest.number, newest.parent or 0]
                if exam != Exam.of(newest.metrics):
                    note = self._store.versions.note
                    await in_store(note, lineage, newest.number, exam.metrics())
        which = {"lineage": lineage, "candidate": numbers[0], "parent": numbers[1]}
        return web.json_response({**which, **asdict(exam)})

    async def _open_all(
        self, request: web.Request, episodes: Sequence[Episode], size: int | None
    ) -> list[Json]:
        if not self._recorder.enabled:
            raise Refused(409, UNRECORDED_EPISODE)
        for episode in episodes[:1]:
            await self._check_version(episode)
        opener, sent = request[GRANT], sent_key(request.headers)
        try:
            keys = {e.id: self._calls.key_of(e.id, opener, sent) for e in episodes}
        except OSError as error:
            log.warning("episodes: %s", error)
            raise Refused(503, "The state folder cannot be used now.") from error
        opened = await in_store(self._store.episodes.open, episodes, size, keys, opener.sign)
        for one in opened:
            held_out, sampling = one.split is Split.EVAL, dict(one.sampling)
            named = Named(
                *(one.id, one.lineage, held_out, sampling, one.version, opener.sign),
                one.max_tokens,
            )
            self._calls.opened(named, keys[one.id])
        address = f"{request.scheme}://{request.host}/episodes"
        return [
            {
                "episode": episode.id,
                "state": episode.state,
                "version": self._version(episode),
                "base_url": f"{address}/{episode.id}/v1",
                "api_key": keys[episode.id],
            }
            for episode in opened
        ]

    async def _check_version(self, episode: Episode) -> None:
        """Raises Refused if the version that shall serve it cannot."""
        if episode.version is None:
            return
        found = await in_store(self._store.versions.get, episode.lineage, episode.version)
        if found is None or not found.can_serve:
            raise Refused(
                400,
                f"version = {episode.version}: lineage {episode.lineage!r} has no such version "
                "with an adapter; see `nextstate versions`, or leave it out.",
            )

    def _version(self, episode: Episode) -> int:
        """The version that serves its next call."""
        if episode.version is not None:
            return episode.version
        return self._versions.serves(episode.lineage).number

    def _episode(self, request: web.Request, asked: Json, name: str) -> Episode:
        with _Checked():
            lineage = self._lineage(request, asked)
            for field in ("environment", "task"):
                if field not in asked:
                    raise RecordError(f"{field} is missing: expected a text")
            if name == DESCRIPTION:
                raise RecordError(
                    f"episode = {name!r}: this is the API's description; choose another"
                )
            size = asked.get("group_size", 1)
            if not 1 <= size <= MOST_IN_GROUP:
                raise RecordError(f"group_size = {size!s:.80}: expected 1 to {MOST_IN_GROUP}")
            if "group_size" in asked and "group" not in asked:
                raise RecordError(f"group_size = {size} without a group: name one")
            _check_metadata(asked.get("metadata", {}))
            given = {k: v for k, v in asked.items() if k not in ("episode", "group_size")}
            split = _choice(Split, "split", asked.get("split", Split.TRAIN))
            for field in ("task", "metadata"):
                if field in given:
                    given[field] = self._redactor.value(given[field])
            values: Json = {**given, "id": name, "lineage": lineage, "split": split}
            return Episode(**values)

    def _lineage(self, request: web.Request, asked: Json) -> str:
        """The lineage that a body names, or that of the key. Raises RecordError."""
        lineage = asked.get("lineage", request[CALLER])
        theirs = [n for n in self._lineages.names if self._lineages.sees(request[CALLER], n)]
        if lineage not in theirs:
            raise RecordError(f"lineage = {lineage!r:.80}: expected {' or '.join(theirs)}")
        return lineage

    def _kept(self, label: str) -> str:
        """What is kept of a label that an environment chose. Raises RecordError and Refused."""
        if not is_label(label):
            return label  # the record says what is wrong with it
        try:
            return self._calls.hide(label)
        except OSError as error:
            log.warning("episodes: %s", error)
            raise Refused(503, "The state folder cannot be used now.") from error

    async def _reward(self, name: str, request: web.Request) -> web.StreamResponse:
        """`POST …/rewards`: keeps all of them or none."""
        data = await self._body(request)
        if not isinstance(data, list):
            raise Refused(400, 'The body is no list: expected [{"kind": "outcome", "value": 1.0}].')
        given = cast("list[object]", data)
        if len(given) > MOST_REWARDS:
            raise Refused(400, f"{len(given)} rewards: expected at most {MOST_REWARDS}.")
        name = await self._settled(name, request)
        steps = await in_store(self._store.episodes.turn_ids, name)
        with _Checked():
            rewards = [_reward(name, one, steps, self._kept) for one in given]
            await in_store(self._store.episodes.reward, rewards)
        return _answer(await in_store(self._store.episodes.shown, name))

    async def _close(self, name: str, request: web.Request) -> web.StreamResponse:
        """`POST …/close`: what the environment showed last is the last turn's next state."""
        asked = await self._asked(request, CLOSE)
        with _Checked():
            status = _choice(EpisodeStatus, "status", asked.get("status"))
            outcome, observation = asked.get("outcome"), asked.get("observation")
            if outcome is not None:
                check_finite("outcome", outcome)
                if status in NEVER_TRAIN:
                    raise RecordError(
                        f"outcome = {outcome:g}: an episode that is closed as {status} has none; "
                        "leave it out, or close it as done or truncated"
                    )
            if observation is not None and len(observation) > MOST_OBSERVATION:
                raise RecordError(f"observation has more than {MOST_OBSERVATION} characters")
        name = await self._settled(name, request)
        observation = observation and self._redactor.text(observation)
        close = self._store.episodes.close
        return _answer(await in_store(close, name, status, outcome, observation))

    async def _get(self, name: str, request: web.Request) -> web.StreamResponse:
        """`GET /v1/episodes/{id}`: the episode with its rewards and turns."""
        name = await self._settled(name, request)
        return _answer(await in_store(self._store.episodes.shown, name))

    async def _trace(self, name: str, request: web.Request) -> web.StreamResponse:
        """`GET …/trace`: the turns whose tokens are known, as OpenEnv's TrainingTrace v1."""
        name = await self._settled(name, request)
        ids = await in_store(self._store.episodes.turn_ids, name)
        turns = [await in_store(self._store.turns.get, turn) for turn in ids]
        return web.json_response(training_trace(turns))

    async def _settled(self, name: str, request: web.Request) -> str:
        """The episode's id, once all replies are recorded. Raises Refused if it is not shown."""
        found = await self._calls.find(name)
        if found is None or not self._lineages.sees(request[CALLER], found.lineage):
            raise Refused(404, f"There is no episode {name[:120]!r}: open it by POST {EPISODES}.")
        if not await self._recorder.settled(self._wait_s):
            raise Refused(503, "Turns still wait for the store.")
        return found.id

    async def _asked(self, request: web.Request, fields: Mapping[str, Field]) -> Json:
        body = await self._body(request)
        with _Checked():
            return _read(body, fields)

    async def _body(self, request: web.Request) -> object:
        if request.content_type != "application/json":
            found = request.headers.get("Content-Type", "none")
            raise Refused(415, f"Content-Type: {found[:100]!r}: expected application/json.")
        data = await read_body(request, self._max_body_mb)
        try:
            return read_json(data)
        except ValueError as error:
            raise Refused(400, f"The body is no JSON: {error}.") from error


async def _describe(_: web.Request) -> web.StreamResponse:
    """`GET /v1/episodes/openapi.json`: the description of this API."""
    return web.json_response(openapi())


def _answer(shown: Shown) -> web.StreamResponse:
    """What the API says of an episode."""
    name, turns = shown.episode.id, shown.turns
    found: Json = {"episode": name, **asdict(shown.episode), "turns": turns}
    del found["id"]
    found["rewards"] = [
        {**asdict(reward), "index": reward.turn and turns.index(reward.turn)}
        for reward in shown.rewards
    ]
    return web.json_response(found)


class _Checked:
    """What a record says against a body is the client's mistake."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NoEpisodeError):
            raise Refused(404, f"{error}.") from error
        if isinstance(error, RecordError):
            raise Refused(400, f"{error}.") from error
        if isinstance(error, RecursionError):  # a message cannot repeat it
            raise Refused(400, "The body is nested too deep.") from error


def _read(body: object, fields: Mapping[str, Field]) -> Json:
    """The fields of a body that are not null. Raises RecordError."""
    if not isinstance(body, dict):
        raise RecordError(f"{body!r:.80} is no object: expected one with {', '.join(fields)}")
    given: Json = {name: value for name, value in cast(Json, body).items() if value is not None}
    for name, value in given.items():
        if name not in fields:
            raise RecordError(f"unknown field {name!r:.80}; {nearest(name, fields)}")
        if not isinstance(value, KINDS[fields[name].kind]) or isinstance(value, bool):
            raise RecordError(f"{name} = {value!r:.80}: expected a {fields[name].kind}")
        try:
            if fields[name].kind == "number":
                given[name] = float(cast(float, value))
            elif isinstance(value, str):
                value.encode()
        except OverflowError:
            raise RecordError(f"{name} has more than 300 digits: expected less") from None
        except UnicodeEncodeError:
            raise RecordError(f"{name} = {value!r:.80} is not valid Unicode") from None
    return given


def _check_metadata(metadata: Json) -> None:
    """Raises RecordError unless an answer can repeat it as JSON."""
    try:
        size = len(write_json(metadata))
        if size <= MOST_METADATA_BYTES:
            json.dumps(metadata, allow_nan=False)
    except ValueError as error:
        raise RecordError(f"metadata cannot be kept: {error}") from None
    if size > MOST_METADATA_BYTES:
        raise RecordError(f"metadata is longer than {MOST_METADATA_BYTES} bytes of JSON")


def _choice(kind: type[_Choice], name: str, value: object) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        raise RecordError(f"{name} = {value!r:.80}: expected {' or '.join(kind)}") from None


def _reward(episode: str, body: object, turns: Sequence[str], kept: Callable[[str], str]) -> Reward:
    """One reward of a body. Raises RecordError and NoEpisodeError."""
    given = _read(body, REWARD)
    if "value" not in given:
        raise RecordError("value is missing: expected a number")
    kind = _choice(RewardKind, "kind", given.get("kind"))
    turn: str | None = given.get("turn")
    index: int | None = given.get("index")
    if turn is not None and index is not None:
        raise RecordError("both turn and index are there: expected one")
    if index is not None:
        if not 0 <= index < len(turns):
            raise NoEpisodeError(
                f"episode {episode!r} has {len(turns)} steps, and no index {index}"
            )
        turn = turns[index]
    elif turn is not None and turn not in turns:
        raise NoEpisodeError(f"episode {episode!r} has no turn {turn!r:.80}")
    name, source = kept(given.get("name", kind.value)), given.get("source")
    return Reward(episode, name, kind, given["value"], turn, source and kept(source))
