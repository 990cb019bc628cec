"""A judge without a model: it knows how people react in English, German, Spanish and Chinese.

It reads a user's message sentence by sentence and stops where the next task begins. Complaints,
corrections and requests for another try outweigh thanks and praise. After a "but" the later half
counts. Plain mockery is a complaint. A mixed or postponed answer is 0. `results.py` reads the
output of tools. A hint is the user's own sentences about what to do, never a tool's text. Whatever
the lexicons do not know is an unsure 0.

What a user says at the end of a task about an earlier step is read like an answer to that step.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from nextstate.hooks import Evidence, JudgeKind, JudgeSettings, is_wordless
from nextstate.records import Source, Vote
from plugins.judges import WithoutModel
from plugins.judges.calls import calls_of
from plugins.judges.lexicons import lexicon_for
from plugins.judges.lexicons.shape import Lexicon, fold, narrow
from plugins.judges.results import SILENT as UNKNOWN
from plugins.judges.results import read_result

HINT_SENTENCES = 3
_RESTATED_SHARE = 0.75
_RESTATED_WORDS = 4
_REPEATED_SHARE = 0.5
_REPEATED_WORDS = 8
_PART_WORDS = 3
_NOVEL_WORDS = 2
_PAIR = 1 / 3
"""How much of a word a pair of Han characters is: two words make about six pairs."""
_MAX_CHARS = 4000

_FENCED = re.compile(r"```.*?(?:```|\Z)|^[ \t]*>[^\n]*", re.DOTALL | re.MULTILINE)
_BREAK = re.compile(
    r"(?<=[.!?…])[\"'”’)*]*\s+|(?<=[。…])[”’)]*\s*|(?<=[!?;~])(?=[\u3400-\u9fff])|\n+"
)
_NO_BREAK = re.compile(
    r"(?:\b(?:e\.g|i\.e|vs|etc|mr|mrs|ms|dr|st|no)|(?:^|\n)[^\S\n]*\d+)\.$", re.I
)
_CLAUSE = re.compile(r"[,;:!?.…()\"“”]+(?!\d)|\s[-–—]\s|[。、~]+|(?<=[\u3400-\u9fff]),")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*'?")
_HAN = re.compile(r"[\u3400-\u9fff]+")
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+")
_MARKUP = re.compile(r"[*`\"“”]")
_EDGES = " \t\n.,;:!?…*_~\"'“”‘’()-–—。、¡¿"
_BAFFLED = re.compile(r"\?[?!]|!\?")
_QUESTION = re.compile(r"\?[^\w?]*$|^\s*¿")

GLAD = "🤝🫡🥳🔥🚀✨💕😘😎🤗🎊🏆🫶💛💚💙💜👍👏🙏😊🙂😀😄😃😁🥰😍🤩🎉❤💯✅🙌👌💪"
SAD = "🤨😩😫👎😡😠🙄🙃😒😞😕☹🤦😤❌🤡😑"


@dataclass(frozen=True, slots=True)
class Reading:
    """What a sentence, or half of one, says about the reply."""

    value: int
    """+1, 0 or -1."""
    strong: bool = False
    """False for mere thanks."""
    hint: int = 0
    """2: it says what to do. 1: it says what was wrong. 0: neither."""


SILENT = Reading(0)


def create(settings: JudgeSettings) -> JudgeKind:
    """The plugin's entry; it needs no settings."""
    return WithoutModel("rules", vote_on)


def vote_on(evidence: Evidence) -> Vote:
    """The vote: by the user's words first, then by the output of tools."""
    asked = next((text for role, text in reversed(evidence.tail) if role == "user"), "")
    states = (*evidence.next_states, *evidence.later)
    heard = [s.text for s in states if s.source in (Source.USER, Source.FEEDBACK)]
    said = [text for text in heard if not is_wordless(text)]
    context = "\n".join([*(text for _, text in evidence.tail), evidence.reply])
    vote = read_message("\n".join(said)[:_MAX_CHARS], asked, evidence.reply, context)
    if vote.score or (said and vote.sure):
        return vote
    arguments = "\n".join(call.arguments for call in calls_of(evidence.reply))
    results = [
        read_result(s.text, asked, arguments)
        for s in evidence.next_states
        if s.source in (Source.TOOL, Source.ENVIRONMENT)
    ]
    sure = [result for result in results if result.sure]
    return min(sure, key=lambda result: result.score, default=vote)


def read_message(text: str, asked: str, reply: str, context: str) -> Vote:
    """The vote by a user's message after `reply` to `asked`; `context` contains both."""
    text = narrow(text)
    if not text.strip():
        return UNKNOWN
    lex = lexicon_for(text, context)
    if narrow(reply).rstrip().endswith("?"):
        text = lex.answered.sub("", text)  # a yes or no to the reply's own question
    seen = content_words(context, lex) | {fold(token) for token in _TOKEN.findall(context)}
    own = _FENCED.sub("\n", text)
    low = plain(own)
    if lex.mockery.search(low) and not lex.earnest.search(low):
        return Vote(-1)
    worst, best, praised, opened = 0, 0, False, False
    doubtful, denied, mixed = False, False, False
    hints: dict[int, list[str]] = {1: [], 2: []}
    for sentence in sentences(own):
        parts = halves(sentence, lex)
        readings = [(half, read_half(half, seen, lex)) for half in parts]
        low = plain(sentence).strip(_EDGES)
        follows = worst < 0 and (lex.imperative.search(low) or lex.order.search(low))
        if (follows and not is_new(sentence, seen, lex)) or (
            best == 0 and same_subject(sentence, seen, lex)
        ):
            readings = [(half, ordered(plain(half), lex)) for half, _ in readings]
        values = [reading for _, reading in readings]
        if opens_task(sentence, values, seen, lex, begun=bool(worst or best)):
            opened = True
            break
        verdict = contrasted(values)
        if verdict.strong and verdict.value > 0 and lex.contrast.match(sentence):
            worst = 0
        mild = verdict.value >= 0 and not verdict.strong
        doubtful = doubtful or (mild and doubts(sentence, lex))
        denied = denied or (mild and denies(sentence, lex))
        worst, best = min(worst, verdict.value), max(best, verdict.value)
        if verdict.strong and verdict.value > 0:
            praised, doubtful = True, False
        mixed = mixed or (praised and worst < 0) or in_parts(readings, lex)
        for half, reading in readings:
            if reading.hint:
                hints[reading.hint].append(half)
    if (mixed or lex.undecided.search(plain(own))) and not hints[2]:
        return Vote(0)
    if worst == 0 and best == 0 and restates(text, asked):
        worst = -1
    if worst < 0:
        return Vote(-1, hint_of(hints[2] or hints[1]))
    if doubtful or (not best and not opened and (denied or repeats(own, asked, lex))):
        return Vote(-1)
    return Vote(best) if best or opened else UNKNOWN


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text; an abbreviation or an item's number does not end one."""
    start = 0
    for gap in _BREAK.finditer(text):
        if not _NO_BREAK.search(text[start : gap.start()]):
            if sentence := text[start : gap.start()].strip():
                yield sentence
            start = gap.end()
    if rest := text[start:].strip():
        yield rest


def halves(sentence: str, lex: Lexicon) -> list[str]:
    """The parts of a sentence around each "but"."""
    return [half for part in lex.contrast.split(sentence) if (half := part.strip())]


def contrasted(readings: list[Reading]) -> Reading:
    """Which half around a "but" counts: the last that is more than polite, else the best.

    After praise or thanks, a last half that says neither is a complaint.
    """
    praised = max((reading.value for reading in readings), default=0) > 0
    if len(readings) > 1 and readings[-1] == SILENT and praised:
        return Reading(-1, True, 1)
    strong = [reading for reading in readings if reading.strong]
    if strong:
        return strong[-1]
    return max(readings, key=lambda reading: reading.value, default=SILENT)


def in_parts(readings: list[tuple[str, Reading]], lex: Lexicon) -> bool:
    """Whether a sentence praises a part of the reply, but not the part after a "but"."""
    *firsts, (_, last) = readings or [("", SILENT)]
    return last.value <= 0 and any(
        reading.strong
        and reading.value > 0
        and len(half.split()) >= _PART_WORDS
        and not lex.reference.search(plain(half))
        for half, reading in firsts
    )


def read_half(half: str, seen: frozenset[str], lex: Lexicon) -> Reading:
    """What a text without a "but" says about the reply."""
    low = plain(half)
    values: list[int] = []
    rest, idiom = without_idioms(low, lex)
    values += idiom
    thanks = False
    for clause in clauses(rest, lex):
        if lex.complaint.search(clause):
            values.append(-1)
        elif lex.praise.search(clause):
            values.append(1)
        thanks = thanks or bool(lex.thanks.search(clause))
    order = lex.directive.search(plain(rest.replace(",", " ")).strip(_EDGES))
    if order and not is_new(half, seen, lex, order.group()):
        return ordered(low, lex)
    if -1 in values:
        return Reading(-1, True, 1 if lex.pointed.search(low) else 0)
    if any(face in half for face in SAD):
        return Reading(-1, True)
    if 1 in values:
        return Reading(1, True)
    glad = thanks or any(face in half for face in GLAD)
    return Reading(1) if glad else SILENT


def clauses(text: str, lex: Lexicon) -> Iterator[str]:
    """The parts between punctuation and conjunctions."""
    for part in _CLAUSE.split(text):
        for clause in lex.conjunction.split(part):
            if tidy := clause.strip(_EDGES):
                yield tidy


def ordered(low: str, lex: Lexicon) -> Reading:
    """How an order about the reply counts; to ask for another try alone makes no hint."""
    words = [token for token in _TOKEN.findall(low) if token not in lex.bare]
    return Reading(-1, True, 2 if words else 0)


def without_idioms(low: str, lex: Lexicon) -> tuple[str, list[int]]:
    """The text without fixed phrases, and the values of these phrases."""
    values: list[int] = []
    for value, pattern in lex.idioms:
        low, count = pattern.subn(" ", low)
        if value and count:
            values.append(value)
    return low, values


def opens_task(
    sentence: str, readings: list[Reading], seen: frozenset[str], lex: Lexicon, *, begun: bool
) -> bool:
    """Whether the next task begins here; `begun`: an earlier sentence was about the reply."""
    low = plain(sentence.replace(",", " ")).strip(_EDGES)
    if _BAFFLED.search(sentence):
        return False
    new = is_new(sentence, seen, lex)
    if lex.new_task.search(low) or (new and lex.soft_transition.search(low)):
        return True
    if any(reading.value < 0 for reading in readings):
        return False
    silent = all(reading == SILENT for reading in readings)
    if silent and (doubts(sentence, lex) or denies(sentence, lex)):
        return False
    return (new and silent and begun) or bool(lex.soft_transition.search(low))


def doubts(sentence: str, lex: Lexicon) -> bool:
    """Whether a sentence corrects the reply softly, or shows surprise at it."""
    low = without_idioms(plain(sentence.replace(",", " ")), lex)[0].strip(_EDGES)
    asks = lex.soft_transition.search(low)
    return bool(_BAFFLED.search(sentence)) or (not asks and bool(lex.doubt.search(low)))


def denies(sentence: str, lex: Lexicon) -> bool:
    """Whether a sentence is a statement with a "not" in it."""
    low = without_idioms(plain(sentence.replace(",", " ")), lex)[0].strip(_EDGES)
    other = _QUESTION.search(sentence) or any(
        pattern.search(low) for pattern in (lex.order, lex.imperative, lex.soft_transition)
    )
    return not other and bool(lex.negation.search(low))


def is_new(text: str, seen: frozenset[str], lex: Lexicon, order: str = "") -> bool:
    """Whether a sentence, without the words of its `order`, leaves the turn's subject."""
    low = plain(text)
    if lex.reference.search(lex.no_reference.sub("", low)):
        return False
    names = {fold(token) for token in _marks(_TOKEN.findall(text))}
    words = content_words(low, lex) | names
    meant = content_words(order, lex) | {fold(token) for token in _TOKEN.findall(order)}
    novel = words - seen - meant
    return sum(_PAIR if _HAN.match(word) else 1 for word in novel) >= _NOVEL_WORDS


def same_subject(sentence: str, seen: frozenset[str], lex: Lexicon) -> bool:
    """Whether an order names only names and numbers of the turn, and at least one."""
    names = {fold(token) for token in _marks(_TOKEN.findall(sentence))}
    return bool(lex.order.search(plain(sentence))) and bool(names) and names <= seen


def restates(text: str, asked: str) -> bool:
    """Whether the user asks the same again: the same numbers and names, mostly the same words."""
    new, old = _TOKEN.findall(text), _TOKEN.findall(asked)
    if len(new) < _RESTATED_WORDS or not old or _marks(new) != _marks(old):
        return False
    mine, theirs = Counter(t.lower() for t in new), Counter(t.lower() for t in old)
    return 2 * (mine & theirs).total() >= _RESTATED_SHARE * (mine.total() + theirs.total())


def repeats(text: str, asked: str, lex: Lexicon) -> bool:
    """Whether a short remark repeats a part of the request that the reply overlooked."""
    words = content_words(text, lex)
    if not words or len(words) > _REPEATED_WORDS or _QUESTION.search(text):
        return False
    return len(words & content_words(asked, lex)) >= _REPEATED_SHARE * len(words)


def hint_of(parts: list[str]) -> str | None:
    """The user's own sentences as a hint, at most HINT_SENTENCES."""
    tidy = [part[0].upper() + part[1:] for part in dict.fromkeys(parts)]
    return " ".join(tidy[:HINT_SENTENCES]) or None


def content_words(text: str, lex: Lexicon) -> frozenset[str]:
    """The words that say what a text is about, without plural s, and pairs of Han characters."""
    low = plain(text)
    words = [w for w in _WORD.findall(_HAN.sub(" ", low)) if w not in lex.common]
    pairs = [run[i : i + 2] for run in _HAN.findall(low) for i in range(len(run) - 1)]
    return frozenset(w.removesuffix("'s").rstrip("s") for w in words) | frozenset(
        pair for pair in pairs if pair not in lex.common
    )


def plain(text: str) -> str:
    """Folded text with straight apostrophes and single spaces, without markup and quotes."""
    return " ".join(_MARKUP.sub("", fold(text).replace("’", "'")).split())


def _marks(tokens: list[str]) -> Counter[str]:
    """Numbers and names: capitalised words that do not stand first."""
    return Counter(
        token
        for position, token in enumerate(tokens)
        if token[0].isdigit() or (position and token[0].isupper() and len(token) > 1)
    )
