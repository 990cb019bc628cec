"""The two personas: what a student or a teacher writes after reading a reply.

Both are ordinary users of a chat: they thank, complain, correct, ask for a redo, or change the
subject. A `Conversation` turns the replies of one policy into the next user messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from demo.checks import is_right, is_whole, satisfies
from demo.tasks import Domain, Task


class Kind(StrEnum):
    """What a reaction says about the reply before it."""

    THANKS = "thanks"
    STYLE = "style"
    """Right, but not written the way the persona wants."""
    CORRECTION = "correction"
    """Wrong: the persona says so and mostly gives the right result."""
    BROKEN = "broken"
    """Empty, cut off or senseless."""
    NEUTRAL = "neutral"
    """No comment: the persona asks something else."""

    @property
    def asks_redo(self) -> bool:
        """Whether the persona wants the same question answered again."""
        return self in (Kind.STYLE, Kind.CORRECTION, Kind.BROKEN)


@dataclass(frozen=True, slots=True)
class Reaction:
    """What the persona says about a reply; empty text if it says nothing."""

    text: str
    kind: Kind
    wants_style: bool = False
    """True if it also says how the reply should be written."""


@dataclass(frozen=True, slots=True)
class Message:
    """A user message to send, the task it wants answered, and what it reacts to."""

    text: str
    task: Task
    reaction: Reaction | None
    """None for the first message of a conversation."""

    @property
    def kind(self) -> Kind | None:
        """The reaction's kind."""
        return self.reaction and self.reaction.kind


NEUTRAL_SHARE = 0.06
INSTRUCTION_SHARE = 0.88

_THANKS = {
    Domain.STUDENT: (
        "Thanks, that helps!", "Thank you!", "Great, thanks.", "Perfect, that sounds like me.",
        "Nice, I can copy that into my notebook.", "That is just how I would write it, thanks!",
        "Super, thank you so much.", "Yes, exactly like that. Thanks!", "Good, I get it now.",
        "Cool, that was easy to follow.", "Great, that reads like my own words.",
        "Thank you, now I understand.", "Lovely, that is what I needed.", "Awesome, thanks a lot!",
        "Perfect.", "Very nice, thank you.", "Thanks, this is clear and simple.",
    ),
    Domain.TEACHER: (
        "Thank you, that is a lovely comment.", "Great, {n} will be happy to read that.",
        "Perfect, thank you!", "Thanks, that is kind and to the point.",
        "Very nice, I will use it.",
        "Wonderful, that says what {n} did.", "Thank you, this helps {n} a lot.", "Great, thanks.",
        "Yes, that is the tone I want. Thanks!", "Excellent, thank you.", "Thanks, well put!",
        "That is just right for {n}, thank you.", "Good, I will write that next to it.",
        "Lovely, this is warm and precise.", "Super, thanks a lot.", "Exactly what I hoped for!",
    ),
}  # fmt: skip
_NEXT = (
    "Next one: ", "Here is another: ", "Now this one: ", "Another question: ", "One more: ",
    "And this? ", "", "", "Then there is this: ", "The next one is: ", "Let us go on: ",
)  # fmt: skip
_CHANGES = (
    "", "", "Something else: ", "Now another thing: ", "A new one: ", "Moving on: ", "Next: ",
    "Let us look at this: ",
)  # fmt: skip

_DISLIKES = {
    Domain.STUDENT: (
        "Hm, this looks machine-written.", "That looks like a robot wrote it.",
        "This does not sound like me.", "My teacher will see that I did not write this.",
        "I can't hand that in.", "Nobody writes like that.", "It looks so stiff.",
        "This looks copied from a computer.", "That is not what I wanted.",
        "I don't like how this looks.", "This is too formal for my notebook.",
        "That reads like a manual.", "No, that looks generated.", "Hm, not like that.",
        "It is right, but it looks like a machine made it.", "Sorry, but that looks artificial.",
        "This isn't how I would write it.", "Too much formatting for me.",
    ),
    Domain.TEACHER: (
        "That is too cold.", "That is too short for a comment.", "This does not help {n} at all.",
        "I can't write that to a child.", "That sounds like a machine.", "Hm, that is too general.",
        "{n} will not learn anything from that.", "That is not what I wanted.",
        "This could be said to anyone.", "It sounds so strict.", "No, that is not a real comment.",
        "That does not say what {n} did.", "I don't like the tone.", "This is not personal enough.",
        "Sorry, but that is too dry.", "It is right, but nobody likes to read that.",
        "{n} would be sad about this.", "That is rather impersonal.",
    ),
}  # fmt: skip

_ASKS = (
    ("Could you write it again", "?"), ("Can you write that", "?"), ("Please write it", "."),
    ("Please say it again", "."), ("Please explain it", "."), ("Could you put it", "?"),
    ("Just tell me", "."), ("I would like it", "."), ("Write it", ", please."),
    ("Can you try again", "?"), ("Please answer", "."), ("Could you rewrite it", "?"),
    ("I want it", "."), ("It should be written", "."), ("Better tell me", "."),
)  # fmt: skip
_MANNERS = (
    "in plain sentences", "in normal sentences", "in simple words", "like a person would",
    "the way I would write it in my notebook", "in ordinary prose", "as plain text",
    "in natural language", "in my own kind of words", "in full sentences", "like a normal text",
    "the way people talk",
)  # fmt: skip
_ORDERS = (
    "Please don't use {f}.", "Please leave out the {f}.", "No {f}, please.",
    "Can you write it again without the {f}?", "Don't write {f}, just normal sentences.",
    "Instead of {f}, write plain sentences.", "I don't want any {f}.", "Could you drop the {f}?",
    "Use plain sentences instead of {f}.", "Without {f}, please.",
)  # fmt: skip
_FEATURES = {
    "bold": ("bold", "bold text", "bold words", "stars"),
    "list": ("numbered steps", "list", "numbered list", "numbers in front"),
    "final": ("final answer line", "answer line", '"Final answer" line', "answer label"),
}
_STUDENT_REASONS = (
    "I have to copy it into my notebook.", "It should sound like me.", "It is for my homework.",
    "Just like I would say it.", "My teacher wants sentences.",
)  # fmt: skip

_TEACHER_ORDERS = (
    "Please be kind and say exactly what {n} did{w}.", "Could you make it warm and specific?",
    "Please use the name and say what {n} did with {a} and {b}.",
    "Could you be friendlier and talk about {s}?", "Please write to {n} and name the numbers.",
    "Can you say something kind about how {n} worked with {a} and {b}?",
    "Be specific and friendly, please.", "Please encourage {n} and mention {s}.",
    "Write it again, kindly and with the numbers that {n} used.",
    "I would like a friendly comment that names what {n} did.",
    "Could you rewrite it so that {n} feels seen?", "Please speak to {n} in a warm way.",
    "Instead, tell {n} in a friendly way what was done with {a} and {b}.",
    "Please don't be so cold, and mention what {n} did.", "Say which step {n} took, and be nice.",
    "It should be addressed to {n} and go into the numbers.",
    "Please name {n}, name the sum, and be friendly.", "Make it personal, friendly and exact.",
    "Could you praise the effort and point to {s}?",
    "Please write a warm comment about what {n} did with the numbers.",
)  # fmt: skip
_TEACHER_REASONS = (
    "{n} needs some encouragement.", "Children read these comments.", "It is for the notebook.",
    "The parents read it too.", "Kind words matter to me.",
)  # fmt: skip

_WRONG = {
    Domain.STUDENT: (
        "No, it should be {r}.", "That is wrong, {s} is {r}.", "Hm, I think {r} is right.",
        "That can't be right, my book says {r}.", "Wrong, the result is {r}.",
        "I get {r}, not that.",
        "There is a mistake, it must be {r}.", "No, the answer is {r}.",
        "My friend says it is {r}, and I think so too.", "That is not correct. It is {r}.",
        "You made a mistake: {s} makes {r}.", "This doesn't fit, I count {r}.",
    ),
    Domain.TEACHER: (
        "No, the answer of {n} is {j}.", "That is wrong: {s} is {r}, so {n} is {j}.",
        "Look again, {s} is {r} and {n} wrote {c}.", "You made a mistake, {n} is {j} here.",
        "That is not correct, the right result is {r}.", "Wrong, {n} is {j}: it should be {r}.",
        "There is a mistake in your comment, {s} makes {r}.", "I checked it, and {n} is {j}.",
    ),
}  # fmt: skip
_FIX = (
    "Please correct it.", "Could you fix that?", "Please try again.", "Can you do it again?",
    "Check the numbers again, please.", "Please look again.", "Write it again with the right one.",
    "", "", "",
)  # fmt: skip
_EMPTY = (
    "Your reply is empty.", "I got nothing back.", "There was no answer.", "The answer is missing.",
    "I see an empty message.", "Nothing came.",
)  # fmt: skip
_NONSENSE = (
    "That makes no sense.", "I don't understand this.", "What is that supposed to mean?",
    "This is gibberish.", "Your answer is broken.", "That is not an answer.", "Huh? I am confused.",
    "This is just a mess of words.", "That text is cut off.", "Sorry, I can't read that.",
)  # fmt: skip
_RETRY = (
    "Please answer my question.", "Could you try again?", "Please answer properly.",
    "Write a proper answer, please.", "Can you answer in whole sentences?", "Please do it again.",
    "Again, please.", "",
)  # fmt: skip


def react(task: Task, reply: str, rng: Random) -> Reaction:
    """The persona's reaction to a reply to its task, without the next question."""
    kind = classify(task, reply)
    silent = kind in (Kind.THANKS, Kind.STYLE) and rng.random() < NEUTRAL_SHARE
    if silent:
        return Reaction("", Kind.NEUTRAL)
    match kind:
        case Kind.THANKS:
            return Reaction(_fill(rng.choice(_THANKS[task.domain]), task), kind)
        case Kind.STYLE:
            return Reaction(_style_complaint(task, reply, rng), kind, wants_style=True)
        case Kind.CORRECTION:
            return _correction(task, reply, rng)
        case _:
            first = rng.choice(_NONSENSE if reply.strip() else _EMPTY)
            return Reaction(f"{first} {rng.choice(_RETRY)}".strip(), kind)


def classify(task: Task, reply: str) -> Kind:
    """The kind of reaction that a reply deserves; never NEUTRAL."""
    if is_right(task, reply):
        return Kind.THANKS if satisfies(task, reply) else Kind.STYLE
    return Kind.CORRECTION if is_whole(task, reply) else Kind.BROKEN


class Conversation:
    """One persona's side of a conversation: feed it replies, it gives the next message or None."""

    def __init__(
        self, tasks: Iterator[Task], rng: Random, *, max_exchanges: int = 3, max_redos: int = 1
    ) -> None:
        self._tasks = tasks
        self._rng = rng
        self._left = max_exchanges
        self._max_redos = max_redos
        self._redos = 0
        self._task = next(tasks)

    def open(self) -> Message:
        """The first message."""
        self._left -= 1
        return Message(self._task.question, self._task, None)

    def answer(self, reply: str) -> Message | None:
        """The next message after a reply; None after the last exchange."""
        if self._left <= 0:
            return None
        self._left -= 1
        reaction = react(self._task, reply, self._rng)
        if reaction.kind.asks_redo and self._redos < self._max_redos:
            self._redos += 1
            return Message(reaction.text, self._task, reaction)
        self._redos = 0
        self._task = next(self._tasks)
        lead = self._rng.choice(_NEXT if reaction.kind is Kind.THANKS else _CHANGES)
        text = f"{reaction.text} {lead}{self._task.question}".strip()
        return Message(text, self._task, reaction)

    @property
    def is_over(self) -> bool:
        """False: the persona reads every reply."""
        return False


def _fill(template: str, task: Task) -> str:
    return template.format(
        n=task.name, a=task.a, b=task.b, s=task.term, r=task.result, c=task.claimed,
        j="right" if task.pupil_right else "wrong", w=" well" if task.pupil_right else "",
    )  # fmt: skip


def _features(reply: str) -> list[str]:
    """The machine-like features of a reply that a student would point at."""
    found = {"bold": "**" in reply, "list": "1. " in reply, "final": "nswer:" in reply}
    return [name for name, seen in found.items() if seen]


def _student_instruction(reply: str, rng: Random) -> str:
    names = [rng.choice(_FEATURES[feature]) for feature in _features(reply)]
    if names and rng.random() < 0.4:
        return rng.choice(_ORDERS).format(f=rng.choice(names))
    ask, stop = rng.choice(_ASKS)
    without = ""
    if names and rng.random() < 0.6:
        without = rng.choice((", without {f}", " and without {f}", ", no {f}", " with no {f}"))
        without = without.format(f=rng.choice((" or ", " and ")).join(names))
    return f"{ask} {rng.choice(_MANNERS)}{without}{stop}"


def _style_instruction(task: Task, reply: str, rng: Random) -> str:
    if task.domain is Domain.STUDENT:
        return _student_instruction(reply, rng)
    return _fill(rng.choice(_TEACHER_ORDERS), task)


def _style_complaint(task: Task, reply: str, rng: Random) -> str:
    dislike = _fill(rng.choice(_DISLIKES[task.domain]), task)
    if rng.random() > INSTRUCTION_SHARE:
        return dislike
    sentences = [_style_instruction(task, reply, rng)]
    if rng.random() < 0.75:
        sentences.insert(0, dislike)
    if rng.random() < 0.2:
        student = task.domain is Domain.STUDENT
        reasons = _STUDENT_REASONS if student else _TEACHER_REASONS
        sentences.append(_fill(rng.choice(reasons), task))
    return " ".join(sentences)


def _correction(task: Task, reply: str, rng: Random) -> Reaction:
    sentences = [_fill(rng.choice(_WRONG[task.domain]), task), rng.choice(_FIX)]
    wants_style = not satisfies(task, reply) and rng.random() < 0.4
    if wants_style:
        sentences.append(_style_instruction(task, reply, rng))
    text = " ".join(sentence for sentence in sentences if sentence)
    return Reaction(text, Kind.CORRECTION, wants_style)
