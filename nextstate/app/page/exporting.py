"""Taking the data out: the command that writes it, for the person at the machine.

The page does not send the data itself: reading a whole store would slow the replies of the proxy
that shows the page.
"""

from __future__ import annotations

import shlex

from nextstate.app.settings import Settings
from nextstate.records import Json
from nextstate.store import Store
from proxy.answers import Refused

WHAT = {
    "sft": "praised turns as conversations",
    "kto": "praised and blamed turns",
    "dpo": "a praised reply beside a blamed one",
    "prompts": "each different request once",
    "traces": "token ids, log-probs and masks",
    "turns": "whole turns with verdicts and feedback",
}
_FORMS = {"jsonl": "JSON lines", "parquet": "Parquet"}


def command(
    settings: Settings, store: Store, lineage: str, what: str | None, form: str | None
) -> Json:
    """What the page for the export shows; with `what` the command too. Raises Refused."""
    if what is not None and what not in WHAT:
        raise Refused(400, f"what = {what[:40]!r}: expected one of {', '.join(WHAT)}.")
    form = form or "jsonl"
    if form not in _FORMS:
        raise Refused(400, f"form = {form[:40]!r}: expected one of {', '.join(_FORMS)}.")
    if what == "turns" and form != "jsonl":
        raise Refused(400, "Whole turns are written as JSON lines only.")
    found = None
    if what is not None:
        words = ["nextstate", "export", what, "--out", f"{what}.{form}", "--lineage", lineage]
        if settings.file.exists():
            words += ["--config", str(settings.file.absolute())]
        if store.vault is not None:
            words.append("--in-clear")
        found = shlex.join(words)
    return {
        "lineage": lineage,
        "kinds": WHAT,
        "forms": _FORMS,
        "what": what or "sft",
        "form": form,
        "command": found,
    }
