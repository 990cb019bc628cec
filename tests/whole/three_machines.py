"""Three network namespaces as three machines, on which the commands of docs/scale.md run.

    unshare --net --mount python -m tests.whole.three_machines FOLDER SECONDS     # as root

On the way the database's link is cut for so long, and at the end the database is killed, and its
stand-by takes its place. Prints what it saw as a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from aiohttp import web

from demo.course import POLICY
from tests.docs.messages import ROOT
from tests.postgresql_server import PROGRAMS
from tests.scripted_engine import MODEL, ScriptedEngine

MACHINES = {"db": "10.0.0.1", "serve": "10.0.0.2", "learn": "10.0.0.3"}
WAIT_S = 400.0
_BLOCK = re.compile(r"^```(?:toml)?\n# (.+?)\n(.*?)^```$", re.M | re.S)


def ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True)


def until(true: Callable[[], Any]) -> Any:
    """Waits for something that other processes do."""
    end = time.monotonic() + WAIT_S
    while not (found := true()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
    return found


class Lan:
    """The machines, and what was started on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = 0
        self.places = {f"/{name}": str(folder / name) for name in ("shared", "srv")}
        for name in ("shared", "srv/db", "srv/standby", *MACHINES):
            (folder / name).mkdir(parents=True)
        (folder / "shared").chmod(0o1777)
        for name in ("srv/db", "srv/standby"):
            shutil.chown(folder / name, "postgres", "postgres")
        (folder / "shared/policy").symlink_to(POLICY)
        ip("link set lo up")
        ip("link add lan type bridge")
        ip("address add 10.0.0.254/24 dev lan")
        ip("link set lan up")
        subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
        for name, address in MACHINES.items():
            ip(f"netns add {name}")
            ip(f"link add to-{name} type veth peer name eth0 netns {name}")
            ip(f"link set to-{name} master lan up")
            own = f"address add {address}/24 dev eth0"
            for line in ("link set lo up", own, "link set eth0 up"):
                ip(f"-n {name} {line}")

    def run(self, where: str, script: str) -> str:
        """Runs a block on the machine, as the user and in the folder that its first line names."""
        found = re.fullmatch(r"(\w+)(, as postgres, in (\S+))?", where)
        assert found is not None, where
        machine, as_postgres, folder = found.groups()
        home = self.here(folder) if as_postgres else str(self.folder / machine)
        own = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        user, shell = own if as_postgres else [], ["bash", "-euo", "pipefail", "-c"]
        path = [str(PROGRAMS[-1].parent), str(Path(sys.executable).parent), os.environ["PATH"]]
        variables = {"PATH": ":".join(path), "HOME": home, "LANG": "C.UTF-8"}
        self.runs += 1
        said = self.folder / f"said-{self.runs}"  # what it leaves running goes on to write there
        with said.open("wb") as output:
            done = subprocess.run(
                ["ip", "netns", "exec", machine, *user, *shell, self.here(script)],
                cwd=home,
                env={**variables, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=False,
            )
        text = said.read_text(errors="replace")
        assert done.returncode == 0, f"{where}: {script}\n{text}"
        return text

    def here(self, text: str) -> str:
        """A text of the document with this test's folders and its engine's model."""
        for name, place in self.places.items():
            text = re.sub(rf"(?<![\w/]){name}\b", place, text)
        return text.replace('"policy"', f'"{MODEL}"')


def stored(address: str) -> int:
    """How many turns the database at an address has; -1 if it cannot be asked."""
    url = f"postgresql://nextstate:correct%20horse@{address}/nextstate?sslmode=require"
    try:
        with psycopg.connect(url, connect_timeout=2) as connection:
            row = connection.execute("SELECT count(*) FROM turns").fetchone()
    except psycopg.Error:
        return -1
    return -1 if row is None else row[0]


def reaches(machine: str, turns: int) -> None:
    until(lambda: stored(MACHINES[machine]) == turns)


def holders(address: str) -> list[str]:
    url = f"postgresql://nextstate:correct%20horse@{address}/nextstate?sslmode=require"
    with psycopg.connect(url) as connection:
        return [row[0] for row in connection.execute("SELECT holder FROM roles").fetchall()]


def go(folder: Path, cut_s: float) -> dict[str, object]:
    text = (ROOT / "docs" / "scale.md").read_text("utf-8")
    section = text[text.index("## From one machine to three") : text.index("### What is one of")]
    blocks = _BLOCK.findall(section)
    assert section.count("```") == 2 * len(blocks)
    lan = Lan(folder)
    for name in ("serve", "learn"):
        config = f'[store]\ndir = "{folder}/shared/nextstate"\n'
        (folder / name / "nextstate.toml").write_text(config)
    lan.run("serve", f"{sys.executable} -m tests.whole.three_machines --old nextstate.toml")
    lan.run("serve", f"{sys.executable} -m tests.whole.three_machines --engine 10.0.0.2 8000 &")
    asking = ""
    before = 0
    for where, script in blocks:
        if "nextstate.toml on" in where:
            for name in ("serve", "learn"):
                (folder / name / "nextstate.toml").write_text(lan.here(script))
            continue
        if "curl" in script:
            asking = script
            until(lambda: _is_up(lan))
            before = stored(MACHINES["db"])
        if "--wait promote" in script:
            until(lambda: stored(MACHINES["learn"]) == stored(MACHINES["db"]) > 0)
            lan.run("learn", asking)  # with the stand-by's consent
            pid = int((folder / "srv/db/data/postmaster.pid").read_text().split()[0])
            ip("link set to-db down")
            os.kill(pid, signal.SIGKILL)
        lan.run(where, script)
        if "curl" in script:
            reaches("db", before + 1)
            until(lambda: holders(MACHINES["db"]))
            ip("link set to-db down")
            end = time.monotonic() + cut_s
            while time.monotonic() < end:
                lan.run("learn", asking)
                before += 1
            ip("link set to-db up")
            reaches("db", before + 1)
        if "synchronous_commit" in script:
            lan.run("learn", asking)
            before += 1
    after = stored(MACHINES["learn"])
    lan.run("learn", asking)
    reaches("learn", after + 1)
    lan.run("serve", [script for where, script in blocks if where == "serve"][-1])  # it verifies
    lost = subprocess.run(["grep", "-l", "is lost", *folder.glob("said-*")], check=False).returncode
    return {"after": after, "before": before, "none_lost": lost == 1, "blocks": len(blocks)}


def _is_up(lan: Lan) -> bool:
    try:
        return '"up"' in lan.run("learn", "curl --fail --silent http://10.0.0.2:8080/healthz")
    except AssertionError:
        return False


def _end_all() -> None:
    """Ends what was started on the machines."""
    for name in MACHINES:
        command = ["ip", "netns", "pids", name]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        for pid in found.stdout.split():
            os.kill(int(pid), signal.SIGKILL)


async def engine(host: str, port: int) -> None:
    """A stand-in for vLLM."""
    runner = web.AppRunner(ScriptedEngine().app())
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    await asyncio.Event().wait()


def old(config: Path) -> None:
    """Records what was there before there were more machines."""
    from nextstate.app.settings import Settings
    from nextstate.store import Store
    from tests.store.test_records import add, turn

    store = Store(Settings.read(config).store)
    add(store, turn(0), turn(1))
    store.close()


def main(arguments: list[str]) -> None:
    if arguments[0] == "--engine":
        asyncio.run(engine(arguments[1], int(arguments[2])))
    elif arguments[0] == "--old":
        old(Path(arguments[1]))
    else:
        try:
            print(json.dumps(go(Path(arguments[0]), float(arguments[1]))))
        finally:
            _end_all()


if __name__ == "__main__":
    main(sys.argv[1:])
