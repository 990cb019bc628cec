"""A reply's text without the thoughts that a model wrote into it."""

from __future__ import annotations

import re

_TAG = r"(?:[a-z]{1,16}:)?(?:ant)?(?:think|thinking|thoughts?|reasoning)"
_CHANNEL = r"\|channel\|>\s{0,4}"
_MARKS = re.compile(
    r"[<\[◁](?:"
    rf"(?P<open>(?<=<)(?:{_TAG}(?:\s[^<>]{{0,200}})?>|\|begin_of_thought\|>|\|START_THINKING\|>|"
    rf"unused94>|\|channel>|{_CHANNEL}(?:analysis|commentary))|(?<=\[)THINK\]|(?<=◁)think▷)|"
    rf"(?P<close>(?<=<)(?:/{_TAG}\s{{0,4}}>|\|end_of_thought\|>|\|END_THINKING\|>|unused95>|"
    rf"channel\|>|{_CHANNEL}final[^<>]{{0,100}}(?:<\|message\|>)?)|(?<=\[)/THINK\]|(?<=◁)/think▷)|"
    r"(?P<frame>(?<=<)(?:\|start\|>\s{0,4}assistant|\|(?:message|end|return)\|>)))",
    re.IGNORECASE,
)
"""The marks around thoughts: tags with several names, those of Mistral, Kimi, Cohere and Gemma, and
the channels of gpt-oss with their frames. Every repetition is bounded. The first character stands
alone, so that the search skips other characters: ten times as fast."""


def without_thoughts(text: str) -> str:
    """`text` without its thoughts, even if some of them have been removed already.

    Text before a closing mark without an opening one is a thought: the template opened it. So is
    text after an opening mark without a closing one: the reply was cut.

    >>> without_thoughts("<think>hm</think>Yes."), without_thoughts("hm</think>Yes.<think>And")
    ('Yes.', 'Yes.')
    """
    kept: list[str] = []
    start, thinking = 0, False
    for mark in _MARKS.finditer(text):
        kind = mark.lastgroup
        if thinking and kind != "close":
            continue
        if kind == "close":
            if not thinking:
                kept.clear()
        else:
            kept.append(text[start : mark.start()])
        thinking = kind == "open"
        start = mark.end()
    if not thinking:
        kept.append(text[start:])
    return "".join(kept)
