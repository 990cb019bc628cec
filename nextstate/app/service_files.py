"""The files that run `nextstate up` as a service: a systemd unit, a Dockerfile, a compose file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nextstate.errors import StartError

MARK = "Written by `nextstate service`"
"""The first line of each file has it: such a file may be replaced."""
HOME = "/nextstate"
"""In a container: the home and working folder."""
_MODELS = "/models"
"""In a container: the model cache."""
Accelerator = Literal["cpu", "cuda"]

_NO_PROGRAM = frozenset("\"'\\")
_UNIT = """\
# {mark}. systemctl --user enable --now nextstate
[Unit]
Description=NextState: a proxy before vLLM that learns from use
StartLimitIntervalSec=600
StartLimitBurst=5

[Service]
Type=exec
WorkingDirectory={folder}
ExecStart=:{command}
# The names and values of api_key_env and the like, NAME=value a line; it may be missing.
EnvironmentFile=-%E/nextstate/environment
Restart=on-failure
RestartSec=10
# 2: only a person can help; `journalctl --user -u nextstate` says how.
RestartPreventExitStatus=2
# Only the supervisor is asked to stop: it ends the processes in their order.
KillMode=mixed
TimeoutStopSec=120
UMask=0077
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""
_DOCKERFILE = """\
# {mark}. Build it in the folder of the sources: see compose.yaml.
FROM python:3.11-slim-bookworm

# vLLM and torch compile for the machine that they run on.
# hadolint ignore=DL3008
RUN apt-get update \\
 && apt-get install --yes --no-install-recommends g++ libnuma1 \\
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/nextstate
# cpu or cuda: which of the locked sets of packages is installed.
ARG ACCEL={accelerator}
# Where pip finds PyTorch's CPU wheel, if your package index does not have it.
ARG TORCH_INDEX=
COPY requirements requirements
RUN if [ "$ACCEL" = cpu ]; then \\
      pip install --no-cache-dir --no-deps ${{TORCH_INDEX:+--index-url "$TORCH_INDEX"}} \\
        -r requirements/torch.txt; \\
    fi \\
 && pip install --no-cache-dir --no-deps --require-hashes -r "requirements/$ACCEL.lock" \\
 && pip install --no-cache-dir --no-deps --require-hashes -r requirements/postgres.txt
COPY . .
# It runs in a folder without modules of ours, which would hide vLLM's; any user may write there.
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \\
 && install --directory --mode=1777 {home}

WORKDIR {home}
USER 1000:1000
# USER: torch asks for the name of a user that the image does not know.
ENV HOME={home} USER=nextstate HF_HOME={models}
ENTRYPOINT ["nextstate"]
CMD ["up"]
"""
_IGNORED = """\
# {mark}. Only what is installed gets into the image: no keys (.env), settings or
# records that lie beside it.
*
!LICENSE
!README.md
!demo
!judge
!learner
!nextstate
!plugins
!proxy
!pyproject.toml
!requirements
!rollout
**/__pycache__
**/.env*
"""
_COMPOSE = """\
# {mark}. docker compose up --build --detach
services:
  nextstate:
    build:
      context: {context}
      args:
        ACCEL: {accelerator}
    user: {user}
    # The proxy listens on this machine's 127.0.0.1, as without a container, and needs no key there.
    network_mode: host
    shm_size: 2gb
    volumes:
      - type: bind
        source: {config}
        target: {home}/nextstate.toml
        read_only: true
      - type: bind
        source: {state}
        target: {state_target}
      - type: bind
        source: {models}
        target: {models_target}
        read_only: true
{more_volumes}    # The variables that api_key_env and the like name.
    env_file:
      - path: .env
        required: false
    # Exit code 2 comes again at once: `docker compose logs` says what a person must do.
    restart: on-failure:5
    stop_grace_period: 2m
{gpu}"""
_VOLUME = """\
      - type: bind
        source: {model}
        target: {model}
        read_only: true
"""
_GPU = """\
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: all
              capabilities: [gpu]
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where things are on this machine; all paths are absolute."""

    program: Path
    """The command `nextstate`."""
    config: Path
    state: Path
    state_dir: str
    """The same, as `[store] dir` says it."""
    models: Path
    """The model cache."""
    model: Path | None
    """The model, if it is a folder."""
    user: str
    """`UID:GID` of whoever runs it."""


def unit(machine: Machine) -> str:
    """The systemd user unit. Raises StartError if a unit cannot hold the program's name."""
    if _NO_PROGRAM.intersection(str(machine.program)):
        raise StartError(f"{machine.program} has a quote or backslash: systemd starts no such file")
    words = (str(machine.program), "up", "--config", str(machine.config))
    folder = _escaped(str(machine.config.parent))
    return _UNIT.format(mark=MARK, folder=folder, command=" ".join(map(_word, words)))


def docker_files(accelerator: Accelerator) -> dict[str, str]:
    """Dockerfile and .dockerignore, for the folder of the sources."""
    return {
        "Dockerfile": _DOCKERFILE.format(
            mark=MARK, accelerator=accelerator, home=HOME, models=_MODELS
        ),
        ".dockerignore": _IGNORED.format(mark=MARK),
    }


def compose_file(machine: Machine, accelerator: Accelerator, context: Path) -> str:
    """The compose file; `context` is the folder of the Dockerfile."""
    quoted = {
        name: _yaml(str(value))
        for name, value in {
            "context": context,
            "config": machine.config,
            "state": machine.state,
            "models": machine.models,
            "state_target": Path(HOME) / machine.state_dir.replace("~", HOME, 1),
        }.items()
    }
    model = machine.model
    return _COMPOSE.format(
        mark=MARK,
        accelerator=accelerator,
        home=HOME,
        models_target=_MODELS,
        user=_yaml(machine.user),
        more_volumes="" if model is None else _VOLUME.format(model=_yaml(str(model))),
        gpu=_GPU if accelerator == "cuda" else "",
        **quoted,
    )


def write_service_file(file: Path, text: str) -> None:
    """Writes a file, and replaces only what `nextstate service` wrote. Raises StartError."""
    try:
        if file.exists() and MARK not in file.read_text(errors="replace").partition("\n")[0]:
            raise StartError(f"{file} is not ours: move it away, or name another folder with --out")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise StartError(f"{file} cannot be written: {error.strerror}") from error


def _word(text: str) -> str:
    """A word of a unit's command line; the `:` before it leaves `$` as it is."""
    return '"' + _escaped(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _escaped(text: str) -> str:
    """A path in a unit. Raises StartError for one that no unit can hold."""
    if any(ord(character) < 32 for character in text):
        raise StartError(f"{text!r} has a control character: a service cannot be started there")
    return text.replace("%", "%%")


def _yaml(text: str) -> str:
    """A quoted string of a compose file, in which `$` begins a variable."""
    return json.dumps(text.replace("$", "$$"), ensure_ascii=False)
