"""Three network namespaces as the nodes of a cluster, one of which is cut off from the others.

    unshare --net --mount python -m tests.app.three_nodes FOLDER SECONDS RANK    # as root

The head, PostgreSQL, proxy, judge and the command are on one. The engine, a stand-in for vLLM, and
the learner are on another one, and go to the third. The cut lasts so many seconds, and until they
are there; agents ask all the time if it lasts any. With a rank of 0 a version that is a whole model
serves. Prints what it saw as a line of JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, LiteralString
from urllib.request import Request, urlopen

import psutil
import psycopg

from demo.course import POLICY
from nextstate.app.engine_access import change_version
from nextstate.app.settings import Settings
from nextstate.engine.client import publish
from nextstate.engine.process import free_port
from nextstate.records import Json, VersionState
from nextstate.store import Store
from tests.app.test_ray_up import Up, actor_of, stand_in
from tests.certificates import certificate
from tests.engine.test_whole import add_version
from tests.postgresql_server import Server
from tests.rollout.two_machines import RAY, ip

HEAD, PORT = "10.77.0.1", 6379
NODES = {"a": "10.77.0.2", "b": "10.77.0.3"}
SHORT_S, WAIT_S = 5.0, 900.0
BOTH = {"engine", "learner"}
AGENTS = 3
CONFIG = """
[store]
dir = "{folder}/state"
url = "{url}"
[engine]
model = "{policy}"
served_model_name = "base"
env = {{ PYTHONPATH = "{path}" }}
[proxy]
host = "0.0.0.0"
port = {port}
api_key_env = "KEY"
[judge]
kind = "rules"
[learner]
lora_rank = {rank}
"""
STARTED = b"Ray runtime started"
THANKS = "Thanks, that is exactly right."
IN_HEAD = '{"nextstate-proxy": 1, "nextstate-judge": 1}'
IN_NODE = '{"nextstate-engine": 1, "nextstate-learner": 1}'
SOON = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
}
"""A node that is cut off is given up after ten seconds."""


def until(true: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + WAIT_S
    while not (found := true()):
        assert time.monotonic() < end, what
        time.sleep(0.5)
    return found


class Node:
    """A node with its network and its own folder of Ray; all of it ends at once."""

    def __init__(self, name: str, rays: Path, log: Path) -> None:
        self.name, self.log = name, log
        own = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        join = [*RAY, f"--address={HEAD}:{PORT}", f"--node-ip-address={NODES[name]}", "--block"]
        command = " ".join(join) + f" '--resources={IN_NODE}'"
        code = f"mount -t tmpfs none {rays} && echo ready && read line && ip link set lo up && "
        code += f"ip address add {NODES[name]}/24 dev eth0 && ip link set eth0 up && "
        code += f"for _ in {{1..20}}; do {command} 1>&2 && break; done"
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [*own, "bash", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        found = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        ip(f"link add to-{name} type veth peer name eth0 netns {found.split()[0]}")
        ip(f"link set to-{name} master lan up")
        self._process.stdin.write(b"\n")
        self._process.stdin.close()

    def started(self) -> bool:
        return STARTED in self.log.read_bytes()

    def parts(self) -> dict[str, int]:
        """The processes of the loop on it, but none that is still a copy of its actor."""
        found: dict[str, int] = {}
        for one in psutil.Process(self._process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if actor_of(one) is None:
                    continue
                words = one.cmdline()
                if "--served-model-name" in words:
                    base = words[words.index("--model") + 1] == str(POLICY)
                    found["engine" if base else "version"] = one.pid
                elif "nextstate" in words[:-1]:
                    found[words[words.index("nextstate") + 1]] = one.pid
        return found

    def cut(self, off: bool) -> None:
        ip(f"link set to-{self.name} {'down' if off else 'up'}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(30)


class Cluster:
    """The three nodes, and the command on the first."""

    def __init__(self, folder: Path, database: Server, rank: int) -> None:
        self.folder, self.database = folder, database
        self.asked = itertools.count()
        self.answered: dict[str, int] = {}
        """The version of each answer, by its turn."""
        self.rays = Path(tempfile.mkdtemp(prefix="ray"))  # Ray's sockets need a short path
        self.port = free_port()
        self.config = folder / "nextstate.toml"
        path = stand_in(folder)
        values = {"rank": rank, "path": path, "folder": folder, "policy": POLICY, "port": self.port}
        database.speak_tls(certificate(folder))
        url = database.database("loop").replace("127.0.0.1", HEAD) + "?sslmode=require"
        self.config.write_text(CONFIG.format(url=url, **values))
        self.of_file = folder / "file.toml"
        self.of_file.write_text(self.config.read_text().replace(url, ""))
        head = [*RAY, "--head", "--include-dashboard=false", f"--node-ip-address={HEAD}"]
        head += [f"--temp-dir={self.rays}", f"--port={PORT}", "--block", f"--resources={IN_HEAD}"]
        self._log = folder / "head.log"
        self._head = head
        self.nodes: dict[str, Node] = {}
        self._start()

    def join(self) -> None:
        """Returns once all nodes are there."""
        until(self._started, "the head starts")
        for name in NODES:  # one by one: on a busy machine Ray gives up a start after 30 s
            self.nodes[name] = node = Node(name, self.rays, self.folder / f"{name}.log")
            until(node.started, "the node joins")

    def _start(self) -> None:
        with self._log.open("ab") as file:
            self._ray = subprocess.Popen(self._head, stdout=file, stderr=file)

    def _started(self) -> bool:
        if self._ray.poll() is not None:  # on a busy machine Ray gives up after 30 s
            self._start()
        return STARTED in self._log.read_bytes()

    def up(self, config: Path | None = None, **variables: str) -> Up:
        cluster = {name: os.environ[name] for name in os.environ if name.startswith("RAY_")}
        return Up(config or self.config, f"{HEAD}:{PORT}", ray=True, **{**cluster, **variables})

    def refused(self, config: Path, **variables: str) -> str:
        """What the command says before it ends."""
        up = self.up(config, **variables)
        code = up.process.wait(WAIT_S)
        said = up.log.read_text()
        up.log.unlink()
        assert code == 2, said
        return said

    def of_engine(self) -> Node | None:
        """The node that has both the engine and the learner now."""
        found = [one for one in self.nodes.values() if one.parts().keys() >= BOTH]
        return found[0] if found else None

    def ask(self, before: Sequence[Json] = ()) -> list[Json]:
        """A request of an agent, after what was said before; all of it, or [] if it failed."""
        text = f"{THANKS if before else 'Hi'} {next(self.asked)}"
        said: Json = {"model": "base", "messages": [*before, {"role": "user", "content": text}]}
        headers = {"Authorization": f"Bearer {os.environ['KEY']}"}
        headers["Content-Type"] = "application/json"
        url = f"http://{HEAD}:{self.port}/v1/chat/completions"
        try:
            with urlopen(Request(url, json.dumps(said).encode(), headers), timeout=130) as reply:
                message = json.load(reply)["choices"][0]["message"]
                version = int(reply.headers["x-nextstate-version"])
                self.answered[reply.headers["x-nextstate-turn"]] = version
        except (OSError, HTTPException):
            return []
        return [*said["messages"], {"role": "assistant", "content": message["content"]}]

    def talk(self, until: threading.Event) -> None:
        """Agents ask, and some say that an answer was right."""
        while not until.wait(0.5):
            self.ask(self.ask())

    def rows(self, statement: LiteralString) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database.url("loop")) as connection:
            return connection.execute(statement).fetchall()

    def close(self) -> None:
        for node in self.nodes.values():
            node.kill()
        self._ray.terminate()
        self._ray.wait(60)
        shutil.rmtree(self.rays, ignore_errors=True)


def serve_whole_model(cluster: Cluster) -> None:
    """Puts a version into service that is a whole model."""
    settings = Settings.read(cluster.config)
    store = Store(settings.store)
    version = add_version(store, cluster.folder, 1, VersionState.RETIRED, POLICY)
    asyncio.run(change_version(settings, publish, store, version))
    store.close()


def turns(cluster: Cluster) -> dict[str, str]:
    """What each turn that is stored was asked last, by its id."""
    store = Store(Settings.read(cluster.config).store)
    found = [turn for name in store.turns.ids() if (turn := store.turns.get(name))]
    store.close()
    return {turn.id: turn.request["messages"][-1]["content"] for turn in found}


def go(cluster: Cluster, cut_s: float, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    wrong = cluster.folder / "wrong"
    wrong.write_text("02" * 32)
    found["wrong token"] = cluster.refused(cluster.config, RAY_AUTH_TOKEN_PATH=str(wrong))
    found["a file"] = cluster.refused(cluster.of_file)
    up = cluster.up()
    up.wait_ready()
    first: Node = until(cluster.of_engine, "engine and learner run on a node")
    second = next(node for node in cluster.nodes.values() if node is not first)

    def ask() -> None:
        until(cluster.ask, "a request is answered")

    ask()
    if not rank:
        serve_whole_model(cluster)
        until(lambda: cluster.ask() and 1 in cluster.answered.values(), "the version serves")
    parts = first.parts() | {name: one.pid for name, one in up.parts().items()}
    found["parts"] = sorted(parts)
    up.process.kill()  # the parts go on
    up.process.wait()
    ask()
    up = cluster.up()
    up.until(lambda: "run already: they go on" in up.log.read_text())
    up.until(lambda: up.log.read_text().count("ready: ") == 2)

    address = (cluster.folder / "state" / "engine.json").read_text()
    actor = actor_of(psutil.Process(first.parts()["engine"]))
    assert actor is not None
    actor.kill()
    until(lambda: first.parts().get("engine", parts["engine"]) != parts["engine"], "it is back")
    ask()
    found["where it was"] = (cluster.folder / "state" / "engine.json").read_text() == address
    parts |= first.parts()

    first.cut(True)
    time.sleep(SHORT_S)
    first.cut(False)
    ask()
    found["same after a short cut"] = first.parts().items() <= parts.items()

    quiet = threading.Event()
    agents = [threading.Thread(target=cluster.talk, args=[quiet]) for _ in range(AGENTS)]
    if cut_s:
        for agent in agents:
            agent.start()
    before = cluster.rows("SELECT epoch FROM roles WHERE name LIKE '%main%'")
    seen, cut = len(cluster.answered), time.monotonic()
    first.cut(True)
    until(lambda: second is cluster.of_engine() or second.parts().keys() >= {"engine"}, "it moves")
    found["moved after s"] = round(time.monotonic() - cut, 1)
    ask()
    found["answers after s"] = round(time.monotonic() - cut, 1)
    until(lambda: not first.parts(), "what is cut off ends")
    found["ended after s"] = round(time.monotonic() - cut, 1)
    until(lambda: second.parts().keys() >= BOTH, "the learner moves")
    until(
        lambda: cluster.rows("SELECT epoch FROM roles WHERE name LIKE '%main%'") > before,
        "the new learner has its role",
    )
    found["new learner after s"] = round(time.monotonic() - cut, 1)
    while time.monotonic() < cut + cut_s:
        time.sleep(0.5)
    found["cut for s"] = round(time.monotonic() - cut, 1)
    found["answered meanwhile"] = len(cluster.answered) - seen
    first.cut(False)
    ask()
    if cut_s:
        until(lambda: first.log.read_bytes().count(STARTED) > 1, "the node joins again")
        back = len(cluster.answered) + 4 * AGENTS
        until(lambda: len(cluster.answered) > back, "agents go on")
        quiet.set()
        for agent in agents:
            agent.join()
    found["versions"] = sorted({*[*cluster.answered.values()][seen:]})
    found["back there"] = [*first.parts()]
    up.process.send_signal(signal.SIGTERM)
    found["up"] = up.process.wait(120)
    found["left"] = [*second.parts(), *first.parts(), *up.parts()]
    stored = turns(cluster)
    found["asked"], found["turns"] = next(cluster.asked), len(stored)
    found["answered"] = len(cluster.answered)
    found["lost"] = [turn for turn in cluster.answered if turn not in stored]
    found["twice"] = [text for text, times in Counter(stored.values()).items() if times > 1]
    found["judged"] = cluster.rows("SELECT count(*) FROM verdicts")[0][0]
    verify = [sys.executable, "-P", "-m", "nextstate", "verify", "--config", str(cluster.config)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    found["verified"] = done.stdout if done.returncode else "ok"
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    logs = [up.log, *(cluster.folder / "state" / "logs").iterdir()]
    found["told"] = [log.name for log in logs if token in log.read_text(errors="replace")]
    return found


def main(folder: Path, cut_s: float, rank: int) -> None:
    ip("link set lo up")
    ip("link add lan type bridge")
    ip(f"address add {HEAD}/24 dev lan")
    ip("link set lan up")
    token = folder / "token"
    token.touch(0o600)
    token.write_text("01" * 32)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), **SOON}
    os.environ |= {"KEY": secrets.token_hex(32), "PYTHONUNBUFFERED": "1"}
    database = Server(listen_addresses="*")
    try:
        with (database.data / "pg_hba.conf").open("a") as file:
            file.write("host all all 10.77.0.0/24 trust\n")
        database.run("SELECT pg_reload_conf()")
        cluster = Cluster(folder, database, rank)
        try:
            cluster.join()
            print(json.dumps(go(cluster, cut_s, rank)))
        finally:
            cluster.close()
    finally:
        database.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
