"""Questions whose answers every instruct model knows: a version that forgets them is broken.

Few words decide whether a reply is right, and most of them are the same in many languages.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the words of which a right reply has one."""

    text: str
    answers: tuple[str, ...]

    def is_right(self, reply: str) -> bool:
        """True if the reply has one of the answers as whole words, however it is written."""
        said = unicodedata.normalize("NFKC", reply).casefold()
        return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", said) for word in self.answers)


QUESTIONS = (
    Question("What is the capital of France?", ("paris",)),
    Question("What is the capital of Japan?", ("tokyo", "tokio")),
    Question("What is the capital of Italy?", ("rome", "rom", "roma")),
    Question("In which country are the pyramids of Giza?", ("egypt", "ägypten")),
    Question("Who wrote Romeo and Juliet?", ("shakespeare",)),
    Question("Who painted the Mona Lisa?", ("leonardo", "vinci")),
    Question("Which planet is the largest of the solar system?", ("jupiter",)),
    Question("Which planet is called the Red Planet?", ("mars",)),
    Question("What is the chemical formula of water?", ("h2o",)),
    Question("At how many degrees Celsius does water boil?", ("100", "100°c", "hundred")),
    Question("How many days are in a week?", ("7", "seven")),
    Question("How many months are in a year?", ("12", "twelve")),
    Question("How many legs does a spider have?", ("8", "eight")),
    Question("How many hours are in a day?", ("24", "twenty-four")),
    Question("What is 2 + 2?", ("4", "four")),
    Question("Which ocean lies between Europe and America?", ("atlantic",)),
)
