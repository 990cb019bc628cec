"""Which episode a request is a call of, and whether that one may call the model once more.

Named by the request's path, else by its key, else by a header of ours, else by a session id that is
an episode's id. A request that names none costs no look into the store.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from uuid import uuid4

from aiohttp import web

from nextstate.episodes import is_label
from nextstate.errors import BudgetError, ConflictError, NoEpisodeError, StoreError
from nextstate.keys import Scope
from nextstate.private_files import secret_of
from nextstate.records import Json
from nextstate.redaction import NOTHING, Redactor
from nextstate.redaction.names import HiddenNames
from nextstate.store import Store
from nextstate.store.episodes import API_KEY, Hold, Left, Named
from nextstate.wire import write_json
from proxy.answers import Refused
from proxy.keys import Grant, Keys
from proxy.requests import PATH_EPISODE
from proxy.spending import Budgets, replies_of, wanted

log = logging.getLogger(__name__)

EPISODE: web.RequestKey[Named] = web.RequestKey("episode", Named)
"""The episode that a request is a call of."""
KEY_FILE = "episodes.key"
"""In the state folder: the secret that goes into each episode's key."""
_KEY, _HEADER, _SESSION = "key", "x-nextstate-episode", "x-session-id"
_MOST_REMEMBERED = 4096
_FREED_AT_ONCE = 500
UNRECORDED_EPISODE = (
    "[privacy] record = false: an episode learns from what is recorded. Switch it on for episodes."
)
_T = TypeVar("_T")


class EpisodeCalls:
    """Finds episodes, and remembers them: what a call needs of one never changes."""

    def __init__(
        self, store: Store, keys: Keys, worker: str | None, redactor: Redactor = NOTHING
    ) -> None:
        """`worker` is the name of this one if there are several."""
        self._episodes = store.episodes
        self.hide = HiddenNames(store.dir, redactor)
        """What is kept of a name that an environment chose."""
        self._folder = store.config.path
        self._secret: bytes | None = None
        self._keys = keys
        self._lineages = keys.lineages
        self._worker = worker
        self._in_use = worker is not None or self._episodes.any()
        self._remembered: dict[tuple[str, str], Named | None] = {}
        self._budgets = Budgets(alone=worker is None)
        self._freeing: set[asyncio.Task[None]] = set()
        self._ended: set[str] = set()
        """Calls that hold nothing any more, and of which the other workers may not know it yet."""
        self._key_of: dict[str, str] = {}
        """The keys of remembered episodes, by id."""

    def key_of(self, episode_id: str, opener: Grant, sent: str) -> str:
        """The key of an episode that is opened with the key `sent`: the same one each time.

        It is made of that key and a secret of the state folder. So who reads the folder has no
        episode's key, and who opens an episode again gets the key that it has. Raises OSError.
        """
        if self._secret is None:
            self._secret = secret_of(self._folder / KEY_FILE)
        said = write_json([episode_id, sent if opener.sign else ""])
        return API_KEY + hashlib.blake2b(said, key=self._secret, digest_size=16).hexdigest()

    def opened(self, episode: Named, key: str) -> None:
        """Notes an episode that is open from now on, and its key, which ends the one before."""
        self._in_use = True
        self._remembered.pop((_SESSION, episode.id), None)
        before = self._key_of.get(episode.id)
        if before is not None:
            self._remembered.pop((_KEY, before), None)
        self._remember(_HEADER, episode.id, episode)
        self._remember(_KEY, key, episode)

    async def of_key(self, key: str) -> Named | None:
        """The episode whose own key this is. Raises Refused if it looks like one and is none."""
        if not key.startswith(API_KEY):
            return None
        found = await self._find(_KEY, key, self._episodes.of_key)
        if found is None:
            message = f"Wrong API key: no episode has it, and only their keys begin with {API_KEY}."
            raise Refused(401, message)
        if not self._keys.in_force(found.opener):
            message = f"The key that opened episode {found.id!r} is not in force: open it again."
            raise Refused(401, message)
        return found

    async def named(
        self, headers: Mapping[str, str], grant: Grant, by_key: Named | None
    ) -> Named | None:
        """The episode that a request names; None if it names none. Raises Refused."""
        caller = grant.lineage
        name = headers.get(PATH_EPISODE)
        if name is None:
            if by_key is not None:
                return by_key
            name = headers.get(_HEADER)
        if name is None:
            session = headers.get(_SESSION)
            if session is None or not self._in_use or not grant.may(Scope.EPISODES):
                return None
            found = await self._find(_SESSION, session, self._episodes.named)
            return found if found and self._lineages.sees(caller, found.lineage) else None
        if by_key is None and not grant.may(Scope.EPISODES):
            raise Refused(403, "Only a key with the scope episodes may call for an episode.")
        found = await self.find(name)
        if found is None or not self._lineages.sees(caller, found.lineage):
            raise Refused(404, f"There is no episode {name[:120]!r}: open it by POST /v1/episodes.")
        if by_key is not None and by_key.id != found.id and self._keys.needed:
            raise Refused(403, f"The key of episode {by_key.id!r} is not that of {found.id!r}.")
        return found

    async def find(self, name: str) -> Named | None:
        """The episode of this name."""
        return await self._find(_HEADER, name, self._episodes.named)

    async def begin(
        self, episode: Named, lineage: str, path: str, body: Json
    ) -> tuple[Json, float | None, Callable[[], None]]:
        """Counts a call for `lineage`. Raises Refused if the episode may not make it.

        Returns (the request, cut to the tokens that are left, the seconds that are left, what to
        call once the turn of the call is stored, or when it has none).
        """
        if lineage != episode.lineage:
            raise Refused(
                400,
                f"Episode {episode.id!r} trains the lineage {episode.lineage!r}, and the model is "
                f"that of {lineage!r}: name the engine's model.",
            )
        begin = self._episodes.begin_call
        if episode.max_tokens is None:
            left = await in_store(begin, episode.id)
            return body, left and left.seconds, _nothing
        replies = replies_of(path, body)

        hold = None
        if self._worker is not None:
            hold = Hold(uuid4().hex, self._worker, wanted(path, body))

        async def beside(held: int) -> Left | None:
            begun = asyncio.create_task(in_store(begin, episode.id, replies, held, hold))
            try:
                return await asyncio.shield(begun)
            except BaseException:  # what its thread may still write is to be freed after that
                if hold is not None:
                    call = hold.call
                    begun.add_done_callback(lambda _: self._ended.add(call))
                raise

        body, left, free = await self._budgets.begin(episode.id, beside, path, body)

        def free_everywhere() -> None:
            free()
            if hold is not None:
                self._ended.add(hold.call)
                task = asyncio.create_task(self._free())
                self._freeing.add(task)
                task.add_done_callback(self._freeing.discard)

        return body, left.seconds, free_everywhere

    def free_ended(self) -> None:
        """Tells the other workers which calls hold nothing any more. Raises StoreError, OSError.

        It is called with each sign of life, because a call that ends may be unable to tell.
        """
        ended = list(self._ended)
        for at in range(0, len(ended), _FREED_AT_ONCE):
            some = ended[at : at + _FREED_AT_ONCE]
            self._episodes.free(some)
            self._ended.difference_update(some)

    async def _free(self) -> None:
        try:
            await asyncio.to_thread(self.free_ended)
        except (StoreError, OSError) as error:
            log.warning("episodes: the tokens of a call are held a while longer: %s", error)

    async def check_open(self, episode: Named) -> None:
        """Raises Refused if the episode is closed."""
        await in_store(self._episodes.check_open, episode.id)

    async def _find(
        self, kind: str, name: str, look_up: Callable[[str], Named | None]
    ) -> Named | None:
        if not is_label(name):
            return None
        key = kind, name
        # Another worker may have opened the episode again, which ends the key before.
        if key in self._remembered and (self._worker is None or kind != _KEY):
            return self._remembered[key]
        kept = name if kind == _KEY else self.hide(name)
        found = await in_store(look_up, kept)
        if found is not None or (kind == _SESSION and kept == name):
            self._remember(kind, name, found)
        return found

    def _remember(self, kind: str, name: str, episode: Named | None) -> None:
        places: list[dict[Any, Any]] = [self._remembered]
        self._remembered[kind, name] = episode
        if kind == _KEY and episode is not None:
            self._key_of.pop(episode.id, None)
            self._key_of[episode.id] = name
            places.append(self._key_of)
        for place in places:
            if len(place) > _MOST_REMEMBERED:
                del place[next(iter(place))]


def _nothing() -> None:
    """What a call without a budget of tokens holds."""


async def in_store(work: Callable[..., _T], *values: object) -> _T:
    """The result of a query in a thread. Raises Refused for what the store says against it."""
    try:
        return await asyncio.to_thread(work, *values)
    except NoEpisodeError as error:
        raise Refused(404, f"{error}.") from error
    except BudgetError as error:
        raise Refused(400, f"{error}.", "EpisodeBudgetError") from error
    except ConflictError as error:
        raise Refused(409, f"{error}.") from error
    except (StoreError, OSError) as error:
        log.warning("episodes: %s", error)
        raise Refused(503, "The store cannot be used now.") from error
