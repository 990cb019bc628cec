"""What mkdocs does beside building docs/: the documents at other places become pages too.

Links of a document are as on disk, so that they lead somewhere in the repository as well. Here they
are changed to where the pages are; a link to a file that is no page becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "results/index.md",
    **{
        f"benchmarks/results/{path.name}": f"results/{path.name}"
        for path in (ROOT / "benchmarks" / "results").glob("*.md")
    },
}
"""Documents outside docs/ by their path in the repository, and where they stand in the site."""
_FETCHED = re.compile(r"""<(?:script|img|iframe|link)[^>]+(?:src|href)=["'](?:https?:)?//[^>]*>""")
_DRAWN = 'class="mermaid"'
"""The theme fetches a program from elsewhere to draw these."""
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the documents at other places."""
    for path, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Changes the links of a page."""
    here = {page: path for path, page in ELSEWHERE.items()}.get(page.file.src_uri)
    on_disk = here or f"docs/{page.file.src_uri}"

    def changed(found: re.Match[str]) -> str:
        mark, text, to = found.groups()
        if to.startswith(("http://", "https://", "#", "mailto:")):
            return found[0]
        path, _, anchor = to.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(on_disk), path))
        if not (ROOT / target).exists():
            return found[0]  # mkdocs says that it leads nowhere
        at = ELSEWHERE.get(target) or target.removeprefix("docs/")
        if at == target:
            return text  # a file of the repository that the site does not have
        link = posixpath.relpath(at, posixpath.dirname(page.file.src_uri) or ".")
        return f"{mark}[{text}]({link}{'#' if anchor else ''}{anchor})"

    return _LINK.sub(changed, markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Raises PluginError if a page would have the browser fetch something from elsewhere."""
    if (found := _FETCHED.search(output)) or _DRAWN in output:
        what = found[0] if found else _DRAWN
        raise PluginError(f"{page.file.src_uri} is not all here: {what}")
    return output
