"""Renders the templates. Everything that they write is escaped: nothing is marked as safe."""

from __future__ import annotations

from datetime import datetime

import jinja2

from nextstate.app.page.charts import score_text
from nextstate.app.page.logins import form_token
from nextstate.app.page.texts import short, visible
from nextstate.app.page.visits import Visit, Visitor


class Renderer:
    """Makes pages from the templates."""

    def __init__(self) -> None:
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("nextstate.app.page"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._templates.filters |= {
            "visible": visible,
            "short": short,
            "when": _when,
            "score_text": score_text,
        }

    def page(self, template: str, visit: Visit, **values: object) -> str:
        """A page for a visitor."""
        return self.render(template, visit.visitor, address=visit.address, **values)

    def render(self, template: str, visitor: Visitor | None = None, **values: object) -> str:
        """A page; without a visitor it has no links to others."""
        token = "" if visitor is None else form_token(visitor.cookie)
        shown = {"visitor": visitor, "token": token, "now": datetime.now(), **values}
        return self._templates.get_template(template).render(shown)


def _when(unix_time: float) -> str:
    try:
        return f"{datetime.fromtimestamp(unix_time):%Y-%m-%d %H:%M}"
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"
