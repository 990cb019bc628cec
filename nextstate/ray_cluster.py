"""A cluster of Ray, joined or started: its token, and which clusters are refused.

`connect` is the only place that imports Ray. It turns Ray's usage statistics off and its token
authentication on, and joins no cluster that lets in somebody without the token.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from nextstate.errors import StartError
from nextstate.private_files import make_file, make_folder
from nextstate.records import Json

TOKEN = "ray-token"
"""The file with the cluster's token, in the state folder."""
_ADDRESS = re.compile(r"[A-Za-z0-9.:\[\]-]{1,253}:[0-9]{1,5}")
_OBJECT_BYTES = 80 << 20
"""Ray's memory for large objects, of which there are none; it takes no less."""
_PROBE_S = 120.0
_PROBE = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1])
"""


def connect(address: str, folder: Path, *, quiet: bool = False) -> Any:
    """Joins the cluster whose head is at `address`, HOST:PORT, or starts Ray on this machine alone.

    `auto` is the cluster in which this process runs as a job. `quiet`: nothing is printed of what
    the nodes say. Returns the module. Raises StartError without Ray, a token or a cluster, and for
    an open one.
    """
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0",
        RAY_AUTH_MODE="token",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",  # else Ray warns of its default
    )
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "auto")
    if address and not _ADDRESS.fullmatch(address):
        raise StartError(
            f"--ray {address!r:.80}: expected HOST:PORT of the cluster's head, or auto in a job of "
            "Ray"
        )
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise StartError(
            "--ray needs Ray: run `make ray` in a clone, or `pip install ray`"
        ) from None
    _find_token(folder, address)
    if address:
        _check(address)
        where: Json = {"address": address}
    else:
        where = {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": 1,
            "object_store_memory": _OBJECT_BYTES,
        }
    try:
        level = logging.ERROR if quiet else logging.WARNING
        ray.init(**where, logging_level=level, log_to_driver=not quiet)
    except Exception as error:
        raise StartError(
            f"Ray did not start: {str(error)[:400]!r}; with --ray HOST:PORT this machine has to be "
            f"a node: ray start --address={address or 'HOST:PORT'}"
        ) from error
    return ray


def is_of_cluster(ray: Any, timeout_s: float) -> bool:
    """Whether the head counts this node among the living; False if it does not answer in time."""
    own = ray.NodeID.from_hex(ray.get_runtime_context().get_node_id())
    try:
        [alive] = ray._private.worker.global_worker.gcs_client.check_alive([own], timeout_s)
    except Exception:  # Ray has several, also of gRPC
        return False
    return bool(alive)


def own_address(ray: Any) -> str:
    """This machine's address in the cluster."""
    return str(ray.util.get_node_ip_address())


def _find_token(folder: Path, address: str) -> None:
    """Sees to it that Ray finds the token of the state folder, or the one that you have set."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    file = (folder / TOKEN).absolute()
    is_new = not file.exists()
    if is_new:
        make_folder(folder)
        make_file(file)
        file.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(file)
    if is_new and address:
        port = address.rpartition(":")[2]
        raise StartError(
            f"a token for the cluster was made: {file}. Copy it to each machine, and start Ray "
            "there with RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE RAY_USAGE_STATS_ENABLED=0: "
            f"`ray start --head --port={port} --include-dashboard=false` at {address}, "
            f"`ray start --address={address}` on the others"
        )


def _check(address: str) -> None:
    """Raises StartError unless the cluster takes our token and refuses whoever has none."""
    ours = {**os.environ}
    nobody = {name: value for name, value in ours.items() if not name.startswith("RAY_AUTH_")}
    command = [sys.executable, "-c", _PROBE, address]
    asked = [
        subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for env in (ours, {**nobody, "RAY_AUTH_MODE": "disabled"})
    ]
    try:
        told = [process.communicate(timeout=_PROBE_S)[1] for process in asked]
    except subprocess.TimeoutExpired:
        raise StartError(f"--ray {address}: no head of Ray answers there") from None
    finally:
        for process in asked:
            process.kill()
    if not asked[1].returncode:
        raise StartError(
            f"--ray {address}: this cluster runs anybody's code, since it asks for no token: start "
            "each of its nodes again with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"
        )
    if asked[0].returncode:
        refused = "AuthenticationError" in told[0]
        raise StartError(
            f"--ray {address}: "
            + (
                f"it has another token than {os.environ.get('RAY_AUTH_TOKEN_PATH') or 'ours'}: "
                "name its file in RAY_AUTH_TOKEN_PATH"
                if refused
                else "no head of Ray answers there"
            )
        )
