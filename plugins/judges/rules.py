"""A judge without a model: a lexicon of how people, in English, react to a reply.

It reads a user's message sentence by sentence, as far as the sentences speak about the reply: where
the next task begins, reading ends. Complaints, corrections and wishes for a redo outweigh thanks
and praise, and after a "but" the later half counts. A tool's error counts against the reply, unless
the world failed (a timeout, a full disk). A tool's success is 0: that a call ran says that it was
well formed, not that it was what the user needed. Hints are the user's own sentences about what to
do, never a tool's text. Whatever the lexicon does not know is 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from nextstate.hooks import Evidence, JudgeKind, JudgeSettings
from nextstate.records import Source, Vote
from plugins.judges import lexicon as lex

HINT_SENTENCES = 3
_RESTATED_SHARE = 0.75
_RESTATED_WORDS = 4
_NOVEL_WORDS = 2
_MAX_CHARS = 4000

_FENCED = re.compile(r"```.*?(?:```|\Z)|^[ \t]*>[^\n]*", re.DOTALL | re.MULTILINE)
_BREAK = re.compile(r"(?<=[.!?…])[\"'”’)*]*\s+|\n+")
_NO_BREAK = re.compile(r"(?:\b(?:e\.g|i\.e|vs|etc|mr|mrs|ms|dr|st|no)|(?:^|\n)\s*\d+)\.$", re.I)
_CLAUSE = re.compile(r"[,;:!?.…()\"“”]+(?!\d)|\s[-–—]\s|\s+(?:and|because|since|so)\s+")
_WORD = re.compile(r"[a-z']+")
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")
_NO_REFERENCE = re.compile(
    r"\b(?:can|could|would|will|are|do) you\b|\b(?:an?|the|any|some) (?:\w+ )?\w+ that\b"
)
_MARKUP = re.compile(r"[*`\"“”]")
_EDGES = " \t\n.,;:!?…*_~\"'“”‘’()-–—"
_ANSWERED = re.compile(
    r"^(?:no|nope|yes|yep|yeah|sure|correct|right|exactly)\b(?!\W+thank)\W*", re.I
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What one sentence, or one half of it, says about the reply."""

    value: int
    """+1, 0 or -1."""
    strong: bool = False
    """False for mere thanks."""
    hint: int = 0
    """2: says what to do. 1: says what was amiss. 0: neither."""


SILENT = Reading(0)


class Rules:
    """The `rules` kind."""

    name = "rules"
    deterministic = True

    async def vote(self, evidence: Evidence, seed: int) -> Vote:
        """The lexicon's vote; it always has one."""
        return vote_on(evidence)

    async def close(self) -> None:
        """Nothing is held."""


def create(settings: JudgeSettings) -> JudgeKind:
    """The plugin's entry; it needs no settings."""
    return Rules()


def vote_on(evidence: Evidence) -> Vote:
    """The vote: what the user says comes first, then what tools report."""
    asked = next((text for role, text in reversed(evidence.tail) if role == "user"), "")
    said = [s.text for s in evidence.next_states if s.source in (Source.USER, Source.FEEDBACK)]
    context = "\n".join([*(text for _, text in evidence.tail), evidence.reply])
    vote = read_message("\n".join(said)[:_MAX_CHARS], asked, evidence.reply, context)
    if vote.score == 0 and any(
        tool_failed(s.text)
        for s in evidence.next_states
        if s.source in (Source.TOOL, Source.ENVIRONMENT)
    ):
        return Vote(-1)
    return vote


def tool_failed(text: str) -> bool:
    """Whether a tool's output reports an error that the call itself caused."""
    text = text[:_MAX_CHARS].lower()
    return bool(lex.TOOL_ERROR.search(text)) and not lex.TOOL_OUTAGE.search(text)


def read_message(text: str, asked: str, reply: str, context: str) -> Vote:
    """The vote of a user's message that followed `reply` to `asked`; `context` holds both."""
    if reply.rstrip().endswith("?"):
        text = _ANSWERED.sub("", text)  # a yes or no to the reply's own question
    seen = content_words(context) | {token.lower() for token in _TOKEN.findall(context)}
    worst, best = 0, 0
    hints: dict[int, list[str]] = {1: [], 2: []}
    for sentence in sentences(_FENCED.sub("\n", text)):
        readings = [(half, read_half(half, seen)) for half in halves(sentence)]
        low = plain(sentence).strip(_EDGES)
        follows = worst < 0 and (lex.IMPERATIVE.search(low) or lex.ORDER.search(low))
        if (follows and not is_new(sentence, seen)) or (best == 0 and same_subject(sentence, seen)):
            readings = [(half, ordered(plain(half))) for half, _ in readings]
        if opens_task(sentence, [reading for _, reading in readings], seen):
            break
        verdict = contrasted([reading for _, reading in readings])
        if verdict.strong and verdict.value > 0 and lex.CONTRAST.match(sentence):
            worst = 0
        worst, best = min(worst, verdict.value), max(best, verdict.value)
        for half, reading in readings:
            if reading.hint:
                hints[reading.hint].append(half)
    if worst == 0 and best == 0 and restates(text, asked):
        worst = -1
    if worst < 0:
        return Vote(-1, hint_of(hints[2] or hints[1]))
    return Vote(best)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text; abbreviations and numbered items do not end one."""
    start = 0
    for gap in _BREAK.finditer(text):
        if not _NO_BREAK.search(text[start : gap.start()]):
            if sentence := text[start : gap.start()].strip():
                yield sentence
            start = gap.end()
    if rest := text[start:].strip():
        yield rest


def halves(sentence: str) -> list[str]:
    """The sentence, cut where a "but" turns it."""
    return [half for part in lex.CONTRAST.split(sentence) if (half := part.strip())]


def contrasted(readings: list[Reading]) -> Reading:
    """Of the halves around a "but", the last that is more than polite; else the worst."""
    strong = [reading for reading in readings if reading.strong]
    if strong:
        return strong[-1]
    return max(readings, key=lambda reading: reading.value, default=SILENT)


def read_half(half: str, seen: frozenset[str]) -> Reading:
    """What a stretch of text without a turn says about the reply."""
    low = plain(half)
    values: list[int] = []
    rest, idiom = without_idioms(low)
    values += idiom
    thanks = False
    for clause in (part.strip(_EDGES) for part in _CLAUSE.split(rest)):
        if not clause:
            continue
        if lex.COMPLAINT.search(clause):
            values.append(-1)
        elif lex.PRAISE.search(clause):
            values.append(1)
        thanks = thanks or bool(lex.THANKS.search(clause))
    order = lex.DIRECTIVE.search(plain(rest.replace(",", " ")).strip(_EDGES))
    if order and not is_new(half, seen, order.group()):
        return ordered(low)
    if -1 in values:
        return Reading(-1, True, 1 if lex.POINTED.search(low) else 0)
    if any(face in half for face in lex.SAD):
        return Reading(-1, True)
    if 1 in values:
        return Reading(1, True)
    glad = thanks or any(face in half for face in lex.GLAD)
    return Reading(1) if glad else SILENT


def ordered(low: str) -> Reading:
    """How an order about the reply counts; one that only asks for another try makes no hint."""
    words = [token for token in _TOKEN.findall(low) if token not in lex.BARE]
    return Reading(-1, True, 2 if words else 0)


def without_idioms(low: str) -> tuple[str, list[int]]:
    """The text without fixed phrases, and what those say."""
    values: list[int] = []
    for value, pattern in lex.IDIOMS:
        low, count = pattern.subn(" ", low)
        if value and count:
            values.append(value)
    return low, values


def opens_task(sentence: str, readings: list[Reading], seen: frozenset[str]) -> bool:
    """Whether the next task begins with this sentence."""
    low = plain(sentence).strip(_EDGES)
    new = is_new(sentence, seen)
    if lex.NEW_TASK.search(low) or (new and lex.SOFT_TRANSITION.search(low)):
        return True
    if any(reading.value < 0 for reading in readings):
        return False
    silent = all(reading == SILENT for reading in readings)
    return (new and silent) or bool(lex.SOFT_TRANSITION.search(low))


def is_new(text: str, seen: frozenset[str], order: str = "") -> bool:
    """Whether a sentence, apart from the words that make it an order, leaves the turn's subject."""
    low = plain(text)
    if lex.REFERENCE.search(_NO_REFERENCE.sub("", low)):
        return False
    names = {token.lower() for token in _marks(_TOKEN.findall(text))}
    words = content_words(low) | names
    meant = content_words(order) | {token.lower() for token in _TOKEN.findall(order)}
    return len(words - seen - meant) >= _NOVEL_WORDS


def same_subject(sentence: str, seen: frozenset[str]) -> bool:
    """Whether an order names what the turn named, and no other name or number."""
    names = {token.lower() for token in _marks(_TOKEN.findall(sentence))}
    return bool(lex.ORDER.search(plain(sentence))) and bool(names) and names <= seen


def restates(text: str, asked: str) -> bool:
    """Whether the user asks the same thing again: same numbers and names, mostly same words."""
    new, old = _TOKEN.findall(text), _TOKEN.findall(asked)
    if len(new) < _RESTATED_WORDS or not old or _marks(new) != _marks(old):
        return False
    mine, theirs = Counter(t.lower() for t in new), Counter(t.lower() for t in old)
    return 2 * (mine & theirs).total() >= _RESTATED_SHARE * (mine.total() + theirs.total())


def hint_of(parts: list[str]) -> str | None:
    """The user's sentences as a hint: verbatim, at most HINT_SENTENCES."""
    tidy = [part[0].upper() + part[1:] for part in dict.fromkeys(parts)]
    return " ".join(tidy[:HINT_SENTENCES]) or None


def content_words(text: str) -> frozenset[str]:
    """The words that say what a text is about, without a plural's s."""
    words = _WORD.findall(text.lower())
    return frozenset(w.removesuffix("'s").rstrip("s") for w in words if w not in lex.COMMON)


def plain(text: str) -> str:
    """Lower case, straight apostrophes, single spaces, no emphasis or quotation marks."""
    return " ".join(_MARKUP.sub("", text.lower().replace("’", "'")).split())


def _marks(tokens: list[str]) -> Counter[str]:
    """Numbers and names: capitalised words that do not stand first."""
    return Counter(
        token
        for position, token in enumerate(tokens)
        if token[0].isdigit() or (position and token[0].isupper() and len(token) > 1)
    )
