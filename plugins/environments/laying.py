"""Lays the files of a check over what an agent has left.

The agent's files come first, and may be in the way: a folder without rights, a link, a file in the
place of a folder, a full disk. So the check's files come into a folder whose name is drawn once the
agent has ended. From there a script takes each to its place, and removes what is in the way. What
it does not lay as it was given, by SHA-256, ends the check: that is a failure of the agent.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from pathlib import PurePosixPath
from shlex import quote

_SUMS, _SCRIPT = "sums", "lay"
_NOT_LAID = "the files of the check cannot be laid over the agent's"
_PLACE = """\
{
set -e
place() {
  source=$1 target=$2
  shift 2
  for folder; do
    [ -d "$folder" ] && [ ! -L "$folder" ] || { rm -rf -- "$folder"; mkdir -- "$folder"; }
    chmod u+rwx -- "$folder"
  done
  [ -L "$target" ] || [ ! -d "$target" ] || chmod -R u+rwx -- "$target"
  rm -rf -- "$target"
  mv -- "$source" "$target"
}
"""
"""In braces, since bash runs what there is of a script that was cut."""


def laid(
    files: Mapping[str, str], check: str, fresh: tuple[str, ...] = ()
) -> tuple[dict[str, str], str]:
    """(the files to add to the agent's, the command that lays them and then checks).

    The paths are those of `files`, from the folder in which the command begins. One may begin with
    a folder of `fresh`, such as /tests, which no agent can write to.
    """
    if not files:
        return {}, check
    folder = f".check-{secrets.token_hex(16)}"
    added: dict[str, str] = {}
    lines = [_PLACE]
    for number, (path, text) in enumerate(sorted(files.items())):
        added[str(number)] = text
        target = PurePosixPath(path)
        parents = [one for one in [*target.parents][::-1] if not _is_given(str(one), fresh)]
        names = (f"{folder}/{number}", *map(_operand, (target, *parents)))
        lines.append(f"place {' '.join(names)}\n")
    added[_SCRIPT] = "".join((*lines, f"rm -rf {folder}\nexit 0\n}}\n"))
    added[_SUMS] = "".join(f"{_hash(text)}  {name}\n" for name, text in added.items())
    lay = (
        f"(cd {folder} && echo '{_hash(added[_SUMS])}  {_SUMS}' | sha256sum -c && "
        f'sha256sum -c {_SUMS} && cd "$OLDPWD" && bash {folder}/{_SCRIPT}) >/dev/null || '
        f"{{ echo {quote(_NOT_LAID)}; exit 1; }}\n"
    )
    return {f"{folder}/{name}": text for name, text in added.items()}, lay + check


def _operand(path: PurePosixPath) -> str:
    return quote(str(path) if path.is_absolute() else f"./{path}")


def _is_given(folder: str, fresh: tuple[str, ...]) -> bool:
    """Whether the sandbox made this folder."""
    return folder in (".", "/") or any(f"{one}/".startswith(f"{folder}/") for one in fresh)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()
