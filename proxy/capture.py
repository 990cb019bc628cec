"""Collects one chat reply from its chunks, and says whether its tokens may train."""

from __future__ import annotations

import re
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeGuard, cast

import orjson

from nextstate.error_text import error_names, safe_text
from nextstate.errors import RecordError
from nextstate.records import Json
from nextstate.sampling import DEFAULTS, NAMES, Sampling
from nextstate.wire import obj, objects
from proxy.told_again import begins_again
from proxy.whole_reply import Whole

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "min_tokens": (0,),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "watermarking": (False,),
    "vllm_xargs": ({},),
    "kv_transfer_params": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
"""Fields that change the sampler's distribution in a way that the learner cannot rebuild, with the
values that change nothing. `min_tokens` and `bad_words` mask what the engine's own tokenizer says.
The learner rebuilds what `nextstate.sampling.Sampling` holds.
"""
_LIMITS = ("seed", "max_tokens", "max_completion_tokens", "stop")
_SHAPED = frozenset((*NAMES, DEFAULTS))
_SETTINGS = frozenset((*NAMES, *_NEUTRAL, *_LIMITS))
"""The fields of a request that are kept with its turn's tokens."""

Piece: TypeAlias = tuple[bytes, bytes, bytes]
"""(deltas, logprobs, token ids without brackets) of content chunks, each as JSON, with commas
between them."""
_TOKEN, _LOGPROB = b'{"token":"', b'","logprob":'
"""Between them stands a token's text, and its log-prob follows. They are never within a JSON
string: there every quote is escaped."""
_ALTERNATIVES = b'"top_logprobs":[{'
"""Stands in log-probs if the client asked for alternatives: each of them has a log-prob too."""
_TEXT, _TEXT_END = b'{"content":"', b'"}'
_BETWEEN_TEXTS = _TEXT_END + b"," + _TEXT
_MISSHAPEN = (TypeError, KeyError, ValueError, AttributeError, IndexError)
"""What reading a chunk raises that is not the API's."""
_UNKNOWN_LOGPROB = -9999.0
"""vLLM sends this for a log-prob that it does not have."""
_LARGEST_LOGPROB = 1e-6
_ENDS = frozenset(("stop", "length", "tool_calls"))
"""The finish reasons of replies whose every token is the model's. vLLM also sends `abort`, `error`
and `repetition`; other engines have more."""
_NAME = re.compile(r"[A-Za-z_]\w{0,39}", re.ASCII)
"""What may be shown of an engine's names: no words of a conversation."""
_UNKNOWN = "unknown"
_FIELDS = frozenset(
    ("role", "content", "reasoning", "reasoning_content", "tool_calls", "annotations", "citations")
)
"""Fields of a message: those that are recorded, and two that say nothing of the model's."""
_TEXT_FIELDS = frozenset(("role", "content"))
_NO_INDEX = "the engine told parts of a tool call without its index"
_MALFORMED = "the reply held values of types that a chat reply does not have"


@dataclass(slots=True)
class Capture:
    """Collects one reply. It needs every chunk, or the whole body, with our additions in it.

    Its fields begin as `[]` and not as `list[str]()`, which takes 2000 instructions more.
    """

    model: str | None = None
    content: list[str] = field(default_factory=lambda: [])
    reasoning: list[str] = field(default_factory=lambda: [])
    tool_calls: dict[int, Json] = field(default_factory=lambda: {})
    finish_reason: str | None = None
    prompt_ids: list[int] | None = None
    completion_ids: list[int] = field(default_factory=lambda: [])
    logprobs: list[float] = field(default_factory=lambda: [])
    usage: Json | None = None
    choices: int = 0
    """The highest choice index seen, plus one."""
    finished: set[int] = field(default_factory=lambda: set())
    """Indexes of the choices whose finish reason has come."""
    error: str | None = None
    """Why the reply could not be read, for example because of an error event in the stream."""
    _told: list[list[bytes] | list[Json]] = field(default_factory=lambda: [])
    """The log-probs as they came: as JSON that was cut at each `_LOGPROB`, or as entries."""
    _said: list[tuple[list[bytes], list[bytes]]] = field(default_factory=lambda: [])
    """(a part of `_told`, the texts of its chunks as JSON), to be compared."""
    _differs: bool = False
    """True if a part of `_told` has another text than its chunks, or may have."""
    _unread: list[Json | bytes | Piece] = field(default_factory=lambda: [])
    _unread_prompt: bytes | None = None
    """The prompt's ids without their brackets, as JSON."""
    _pieces: list[Piece] = field(default_factory=lambda: [])
    """Content chunks that came after everything in `_unread`."""
    _seams: dict[int, list[int]] = field(default_factory=lambda: {})
    """By a call's index, where parts of its arguments begin that begin as a whole would."""
    _checked: tuple[tuple[float, ...], bool] | None = None
    """(the log-probs, whether all of them are known), once that was asked for."""

    def piece(self, piece: Piece) -> None:
        """Adds content chunks of a stream with a single choice, as the bytes of their parts."""
        self._pieces.append(piece)

    def chunk(self, chunk: Json, payload: bytes | None = None) -> None:
        """Adds one streamed chunk, which must not change later, and the JSON it was read from.

        Only its model and its finish reasons are read now. JSON is handed over faster than objects:
        a long prompt's ids make a large one.
        """
        self.join()
        self._unread.append(chunk if payload is None else payload)
        self._named(chunk)
        for choice in objects(chunk.get("choices")):
            if choice.get("finish_reason") is not None and _is_count(choice.get("index", 0)):
                self.finished.add(choice.get("index", 0))

    def cut(self, piece: Piece) -> None:
        """Takes the last chunk's parts in its place: they say the same, and are read faster."""
        self._unread.pop()
        self.piece(piece)

    def join(self) -> None:
        """Joins pieces that follow each other: a few long ones are handed over faster."""
        if self._pieces:
            deltas, logprobs, ids = map(b",".join, zip(*self._pieces, strict=True))
            self._pieces.clear()
            self._unread.append((deltas, logprobs, ids))

    def read(self) -> None:
        """Reads what was added. This is not done while the reply is relayed."""
        self.join()
        unread, self._unread = self._unread, []
        prompt, self._unread_prompt = self._unread_prompt, None
        if prompt is not None:
            try:
                self.prompt_ids = self._ids(orjson.loads(b"[" + prompt + b"]"))
            except orjson.JSONDecodeError:
                self.error = _MALFORMED
        for part in unread:
            if isinstance(part, tuple):
                self._read_piece(part)
            else:
                chunk = orjson.loads(part) if isinstance(part, bytes) else part
                self._choices(chunk, "delta")

    @property
    def tokens(self) -> int:
        """How many tokens the reply has, as far as the engine told it."""
        told = (self.usage or {}).get("completion_tokens")
        return told if _is_count(told) else len(self.completion_ids)

    def _read_piece(self, piece: Piece) -> None:
        deltas, logprobs, ids = piece
        try:
            token_ids = self._ids(orjson.loads(b"[" + ids + b"]"))
            cut = self._read_logprobs(logprobs, len(token_ids))
            said = self._deltas(deltas)
            if cut is None or said is None:
                self._differs = True
            else:
                self._said.append((cut, said))
        except _MISSHAPEN as error:
            self.error = f"the stream could not be read: {safe_text(error)}"
        else:
            self.completion_ids.extend(token_ids)
            self.choices = max(self.choices, 1)

    def _read_logprobs(self, told: bytes, tokens: int) -> list[bytes] | None:
        """Adds the sampled tokens' log-probs. Returns `told`, cut; None if it had to be parsed."""
        cut = told.split(_LOGPROB)
        if len(cut) == tokens + 1 and _ALTERNATIVES not in told:
            with suppress(orjson.JSONDecodeError):
                numbers = b",".join([one.partition(b",")[0] for one in cut[1:]])
                known = orjson.loads(b"[" + numbers + b"]")
                if None in known:
                    raise TypeError("a log-prob is null")
                self.logprobs.extend(known)
                self._told.append(cut)
                return cut
        chunks = objects(orjson.loads(b"[" + told + b"]"))
        entries = [entry for chunk in chunks for entry in objects(chunk.get("content"))]
        self.logprobs.extend(float(entry["logprob"]) for entry in entries)
        self._told.append(entries)
        return None

    def _deltas(self, deltas: bytes) -> list[bytes] | None:
        """Adds what several chunks said. Returns their texts as JSON if they say nothing else."""
        if deltas.startswith(_TEXT) and deltas.endswith(_TEXT_END):
            # Nearly all hold a text and nothing else. Any other one leaves a bare quote here.
            texts = deltas[len(_TEXT) : -len(_TEXT_END)].split(_BETWEEN_TEXTS)
            with suppress(orjson.JSONDecodeError):
                self.content.append(orjson.loads(b'"' + b"".join(texts) + b'"'))
                return texts
        for delta in objects(orjson.loads(b"[" + deltas + b"]")):
            self._delta(delta)
        return None

    def _choices(self, data: Json, said: str) -> None:
        try:
            self._head(data)
            for choice in objects(data.get("choices")):
                if self._skip(choice):
                    continue
                delta, ended = obj(choice.get(said)), self.finish_reason is not None
                if ended and (choice.get("token_ids") or any(delta.values())):
                    self.error = "the engine sent parts of the reply after its end"
                texts = self._tokens(choice)
                self._differs = self._differs or texts != (delta.get("content") or "")
                self._delta(delta, whole=said == "message")
        except _MISSHAPEN as error:
            self.error = f"the stream could not be read: {safe_text(error)}"

    def body(self, reply: Json) -> None:
        """Adds a plain reply."""
        self._choices(reply, "message")

    def whole(self, reply: Whole) -> None:
        """Adds a plain reply that was taken apart."""
        self.body(reply.rest)
        self._unread.append((b"", b'{"content":[' + reply.logprobs + b"]}", reply.ids))
        self._unread_prompt = reply.prompt_ids

    def message(self) -> Json:
        """The assistant message, as an agent would put it into its history."""
        self.read()
        message: Json = {"role": "assistant", "content": "".join(self.content)}
        if self.reasoning:
            message["reasoning"] = "".join(self.reasoning)
        if self.tool_calls:
            message["tool_calls"] = [call for _, call in sorted(self.tool_calls.items())]
            message["content"] = message["content"] or None
        return message

    def behaviour_logprobs(self) -> tuple[float, ...] | None:
        """The sampled tokens' log-probs; None unless all of them are known."""
        if len(self.logprobs) != len(self.completion_ids) or not self.logprobs:
            return None
        if self._checked is None or len(self._checked[0]) != len(self.logprobs):
            told = tuple(self.logprobs)
            self._checked = told, min(told) > _UNKNOWN_LOGPROB and max(told) <= _LARGEST_LOGPROB
        told, known = self._checked
        return told if known else None

    def pieces(self) -> list[str] | None:
        """The text of each sampled token, as the engine told it; None if it did not for all."""
        self.read()
        found: list[Any] = []
        for told in self._told:
            found += _token_texts(told)
        if len(found) != len(self.completion_ids) or not all(isinstance(t, str) for t in found):
            return None
        return cast("list[str]", found)

    def says_its_tokens(self) -> bool:
        """True if the message's text is that of the sampled tokens, letter by letter.

        False also if that cannot be seen without parsing all that was told.
        """
        self.read()
        if self._differs or len(self.logprobs) != len(self.completion_ids):
            return False
        return all(_ends_with_tokens(cut, said) for cut, said in self._said)

    def untrainable(self, request: Json) -> str | None:
        """Why the turn must not train, or None when ids, log-probs and usage agree exactly."""
        self.read()
        if self.choices > 1:
            return f"the request asked for {self.choices} choices"
        if (broken := self.error or self._broken_call()) is not None:
            return broken
        if self.finish_reason is None:
            return "the reply was cut before its end"
        if self.finish_reason not in _ENDS:
            known = self.finish_reason != _UNKNOWN
            by = f"by {self.finish_reason}" if known else "for a reason that is not known"
            return f"the reply was ended {by}"
        if not self.choices:
            return "the engine sent no choice"
        shaped = distribution_change(request)
        if shaped is not None:
            return shaped
        if not self.prompt_ids or not self.completion_ids:
            return "the engine returned no token ids"
        if len(self.logprobs) != len(self.completion_ids):
            return (
                f"the engine returned {len(self.completion_ids)} token ids and "
                f"{len(self.logprobs)} log-probs"
            )
        if self.behaviour_logprobs() is None:
            return "the engine did not know the log-prob of every token"
        usage = self.usage or {}
        counted = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        if counted != (len(self.prompt_ids), len(self.completion_ids)):
            return (
                f"usage counts {counted[0]} + {counted[1]} tokens, the engine returned "
                f"{len(self.prompt_ids)} + {len(self.completion_ids)} ids"
            )
        return None

    def _head(self, data: Json) -> None:
        if "error" in data:
            names = ", ".join(error_names(data)) or "it is not named"
            self.error = f"the engine reported an error: {names}"
        self._named(data)
        if data.get("prompt_token_ids") is not None:
            ids = self._ids(data["prompt_token_ids"])
            if self.prompt_ids not in (None, ids):
                self.error = "the engine told two prompts"
            self.prompt_ids = ids
        if data.get("usage") is not None:
            self.usage = obj(data["usage"])

    def _named(self, data: Json) -> None:
        if isinstance(model := data.get("model"), str):
            if self.model not in (None, model):
                self.error = "the engine named two models"
            self.model = model

    def _skip(self, choice: Json) -> bool:
        index = choice.get("index", 0)
        if not _is_count(index):
            self.error = _MALFORMED
            return True
        self.choices = max(self.choices, index + 1)
        if choice.get("finish_reason") is not None:
            self.finished.add(index)
        return index != 0

    def _tokens(self, choice: Json) -> str | None:
        """Adds the tokens of a choice. Returns their text; None if it is not told."""
        if choice.get("token_ids") is not None:
            self.completion_ids.extend(self._ids(choice["token_ids"]))
        entries = objects(obj(choice.get("logprobs")).get("content"))
        self.logprobs.extend(float(entry["logprob"]) for entry in entries)
        if (reason := choice.get("finish_reason")) is not None:
            if not isinstance(reason, str):
                self.error = _MALFORMED
            self.finish_reason = reason if _NAME.fullmatch(str(reason)) else _UNKNOWN
        if not entries:
            return ""
        self._told.append(entries)
        try:
            return "".join([entry["token"] for entry in entries])
        except (KeyError, TypeError):
            return None

    def _ids(self, value: object) -> list[int]:
        """The token ids in `value`. Anything else makes the turn untrainable."""
        ids = cast("list[int]", value) if isinstance(value, list) else []
        try:
            struct.pack(f"{len(ids)}I", *ids)
        except (struct.error, OverflowError, TypeError):
            ids = []
        if ids is not value:
            self.error = _MALFORMED
        return ids

    def _delta(self, delta: Json, *, whole: bool = False) -> None:
        if isinstance(text := delta.get("content"), str):
            self.content.append(text)
        elif text is not None:
            self.error = _MALFORMED
        if delta.keys() <= _TEXT_FIELDS:
            return
        self._thought(delta)
        if any(value and name not in _FIELDS for name, value in delta.items()):
            names = [name for name in delta if delta[name] and name not in _FIELDS]
            known = ", ".join(name for name in names if _NAME.fullmatch(name)) or "a field"
            self.error = f"the reply held {known}, that is not recorded"
        calls = objects(delta.get("tool_calls"))
        if calls != (delta.get("tool_calls") or []):
            self.error = _MALFORMED
        for position, call in enumerate(calls):
            index = position if whole else call.get("index")
            if _is_count(index):
                self._tool_call(index, call)
            else:
                self.error = _NO_INDEX

    def _thought(self, delta: Json) -> None:
        told = [delta.get("reasoning"), delta.get("reasoning_content")]
        thoughts = [thought for thought in told if thought]
        if not all(isinstance(one, str) and one == thoughts[0] for one in thoughts):
            self.error = _MALFORMED
        elif thoughts:
            self.reasoning.append(thoughts[0])

    def _tool_call(self, index: int, call: Json) -> None:
        """Adds a part of the call at `index`: its name comes once, and its arguments in order."""
        known = self.tool_calls.setdefault(
            index, {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
        )
        function, joined = obj(call.get("function")), known["function"]
        identity = call.get("id") or known["id"]
        name, arguments = function.get("name"), function.get("arguments")
        if (known["id"] or identity) != identity or (name and any(joined.values())):
            # Some engines give every call the number 0, or repeat its name in every part. Clients
            # read two calls as one, or a name twice. vLLM sends a name in one piece.
            self.error = _twice(index)
            return
        known["id"] = identity
        if call.get("type") not in (None, "function"):
            self.error = "the engine told a tool call of another type than function"
        if joined["arguments"] and str(arguments).lstrip().startswith(("{", "[")):
            self._seams.setdefault(index, []).append(len(joined["arguments"]))
        for key, part in (("name", name), ("arguments", arguments)):
            if isinstance(part, str):
                joined[key] += part
            elif part is not None:
                self.error = _MALFORMED

    def _broken_call(self) -> str | None:
        """Why the calls are not what the model called, or None."""
        for index, call in self.tool_calls.items():
            function = call["function"]
            if not function["name"]:
                return "the engine told a tool call without its name"
            seams = self._seams.get(index)
            cut = self.finish_reason == "length"
            if seams and begins_again(function["arguments"], seams, cut=cut):
                return _twice(index)
        return None


def _twice(index: int) -> str:
    return f"the engine began the tool call {index} twice"


def _ends_with_tokens(cut: list[bytes], said: list[bytes]) -> bool:
    """Whether each part but the last ends with the next text as a token's."""
    # None is longer than what it is compared with, so together they are equal only if each is.
    ends = [part[-len(text) - len(_TOKEN) :] for part, text in zip(cut, said, strict=False)]
    return len(cut) == len(said) + 1 and b"".join(ends) == _TOKEN + _TOKEN.join(said)


def _token_texts(told: list[bytes] | list[Json]) -> list[Any]:
    """The tokens' texts in a part of `Capture._told`; none if one of them has none."""
    if not told or not isinstance(told[-1], bytes):
        return [entry.get("token") for entry in cast("list[Json]", told)]
    try:
        texts = [one[one.rindex(_TOKEN) + len(_TOKEN) :] for one in cast("list[bytes]", told[:-1])]
        return orjson.loads(b'["' + b'","'.join(texts) + b'"]')
    except ValueError:
        return []


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and value is not True and 0 <= value < 1 << 32


def distribution_change(request: Json) -> str | None:
    """Why the learner cannot rebuild the distribution that was sampled, or None."""
    for name, value in request.items():
        if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
            shown = f" = {value}" if isinstance(value, (int, float)) else ""  # a text may quote
            return f"sampled with {name}{shown}, which cannot be rebuilt for training"
    if not _SHAPED.isdisjoint(request):
        try:
            Sampling.read(request)
        except RecordError as error:
            return str(error)
    choice = request.get("tool_choice")
    if choice is not None and choice not in ("auto", "none"):
        return "sampled under a grammar (forced tool call)"
    tools = objects(request.get("tools")) if choice != "none" else []
    if any(obj(tool.get("function")).get("strict") for tool in tools):
        return "sampled under a grammar (strict tool)"
    if tools and request.get("parallel_tool_calls") is False:
        return "sampled under a grammar (parallel_tool_calls = false)"
    return None


def sampling_settings(request: Json, defaults: Json) -> Json:
    """The sampling fields that the client sent, and those of the engine's `defaults` that held."""
    sent = {n: value for n, value in request.items() if n in _SETTINGS and value is not None}
    held = {name: value for name, value in defaults.items() if name not in sent}
    return {**sent, DEFAULTS: held} if held else sent
