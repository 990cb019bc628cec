"""Two network namespaces as two machines that share a PostgreSQL; one of them is cut off.

    unshare --net --mount-proc --pid --fork --kill-child \
        python -m tests.store.cut_off FOLDER SECONDS     # as root

The database is on this one. No packet passes for so many seconds, and nobody is told: no connection
is closed. Then both go on. Prints what it saw as a line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nextstate.config import StoreConfig
from tests.certificates import certificate
from tests.postgresql_server import Server
from tests.rollout.two_machines import ip
from tests.store.machine import Acknowledged, Machine, check

HERE, THERE = "10.78.0.1", "10.78.0.2"
WAIT_S = 300.0


class Away:
    """The machine that is cut off."""

    def __init__(self, url: str, folder: Path) -> None:
        ip("netns add away")
        ip("link add lan type bridge")
        ip(f"address add {HERE}/24 dev lan")
        ip("link set lan up")
        ip("link add to-away type veth peer name eth0 netns away")
        ip("link set to-away master lan up")
        ip("-n away link set lo up")
        ip(f"-n away address add {THERE}/24 dev eth0")
        ip("-n away link set eth0 up")
        command = ["ip", "netns", "exec", "away", sys.executable, "-m", "tests.store.machine"]
        self._process = subprocess.Popen(
            [*command, url, str(folder), "away"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def had(self) -> Acknowledged:
        """What has been acknowledged to it so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._told()

    def _told(self) -> Acknowledged:
        assert self._process.stdout is not None
        return Acknowledged(**json.loads(self._process.stdout.readline()))

    def cut(self, off: bool) -> None:
        """Its cable ends nowhere; both ends still have a carrier."""
        ip("link set to-away nomaster" if off else "link set to-away master lan")

    def end(self) -> Acknowledged:
        assert self._process.stdin is not None
        self._process.stdin.close()
        had = self._told()
        assert self._process.wait(60) == 0
        return had

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def until(true: Callable[[], Any], *machines: Machine) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, "it did not happen"
        assert not any(one.errors for one in machines), [one.errors for one in machines]
        time.sleep(0.1)


def go(database: Server, folder: Path, seconds: float) -> dict[str, Any]:
    plain = database.database("shared")
    config = StoreConfig(str(folder / "here"), plain)
    with ExitStack() as ending:
        away = Away(plain.replace("127.0.0.1", HERE) + "?sslmode=require", folder / "away")
        ending.callback(away.kill)
        until(lambda: away.had.trained)  # it has the role
        here = Machine(config, "here")
        ending.callback(here.stop)
        until(lambda: here.had.recorded and here.had.judged, here)
        away.cut(True)
        time.sleep(seconds)
        trained = len(here.had.trained)
        away.cut(False)
        back, recorded = len(away.had.recorded), len(here.had.recorded)
        until(
            lambda: len(away.had.recorded) > back + 4 and len(here.had.recorded) > recorded + 4,
            here,
        )
        made = len(here.had.trained) + len(away.had.trained)
        until(lambda: len(here.had.trained) + len(away.had.trained) > made, here)
        ended = away.end()
    here.join()
    check(config, here.had, ended)
    return {"away": asdict(ended), "here": asdict(here.had), "trained meanwhile": trained}


def main(folder: Path, seconds: float) -> None:
    ip("link set lo up")
    subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
    database = Server(listen_addresses="*")
    try:
        database.speak_tls(certificate(folder))
        with (database.data / "pg_hba.conf").open("a") as file:
            file.write("host all all 10.78.0.0/24 trust\n")
        database.run("SELECT pg_reload_conf()")
        print(json.dumps(go(database, folder, seconds)))
    finally:
        database.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
