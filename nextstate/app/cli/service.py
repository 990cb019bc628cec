"""`nextstate service`: writes the files that run it as a service."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextstate.app.cli.common import add_command

if TYPE_CHECKING:
    from nextstate.app.service_files import Machine

_KINDS = "systemd", "docker", "compose"
_EPILOG = """\
KIND is
  systemd   a user unit: ~/.config/systemd/user/nextstate.service
  docker    Dockerfile and .dockerignore, in the folder of NextState's sources
  compose   the same, and compose.yaml, which runs it with your configuration and state folder

examples:
  nextstate service systemd                 then: systemctl --user enable --now nextstate
  nextstate service compose --accel cuda    then: docker compose up --build --detach
  nextstate service systemd --out .         look at it first
"""


def add(subparsers: Any) -> None:
    text = "write a systemd unit, a Dockerfile or a compose file"
    parser = add_command(subparsers, "service", run, text)
    parser.epilog = _EPILOG
    parser.add_argument("kind", metavar="KIND", choices=_KINDS, help="which; see below")
    text = "the folder that gets the files (default: systemd's, or this one)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=text)
    text = "for docker and compose: which packages (default: cuda if there is a driver, else cpu)"
    parser.add_argument("--accel", choices=("cpu", "cuda"), help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.first_file import visible_gpus
    from nextstate.app.service_files import compose_file, docker_files, unit, write_service_file
    from nextstate.errors import StartError

    machine = _machine(args.config)
    accelerator = args.accel or ("cuda" if visible_gpus() else "cpu")
    if args.kind == "systemd":
        config_home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
        folder = args.out or config_home / "systemd" / "user"
        files = {"nextstate.service": unit(machine)}
        then = (
            "systemctl --user daemon-reload && systemctl --user enable --now nextstate"
            "   (loginctl enable-linger: also while nobody is logged in)"
        )
    else:
        folder = args.out or Path()
        if not (folder / "requirements" / f"{accelerator}.lock").is_file():
            raise StartError(
                f"{folder.absolute()} is not the folder of NextState's sources, from which an "
                "image is built: run this there, or name it with --out"
            )
        files = docker_files(accelerator)
        then = f"docker build --build-arg ACCEL={accelerator} --tag nextstate {folder}"
        if args.kind == "compose":
            files["compose.yaml"] = compose_file(machine, accelerator, folder.absolute())
            machine.state.mkdir(parents=True, exist_ok=True)  # Docker would make it root's
            then = "docker compose up --build --detach"
    for name, text in files.items():
        write_service_file(folder / name, text)
        print(f"{folder / name} is written")
    print(f"next: {then}")
    return 0


def _machine(config: Path) -> Machine:
    from huggingface_hub.constants import HF_HOME

    from nextstate.app.service_files import Machine
    from nextstate.app.settings import Settings
    from nextstate.errors import StartError

    if not config.exists():
        raise StartError(f"there is no file {config}: `nextstate up` makes it at the first start")
    settings = Settings.read(config)
    model = Path(settings.engine.model_path)
    return Machine(
        program=Path(sys.executable).parent / "nextstate",
        config=config.absolute(),
        state=settings.store.path,
        state_dir=settings.store.dir,
        models=Path(HF_HOME).expanduser().absolute(),
        model=model if model.is_dir() else None,
        user=f"{os.getuid()}:{os.getgid()}",
    )
