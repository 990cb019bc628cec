"""The sampling settings that an engine uses for what a request leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from nextstate.config import EngineConfig
from nextstate.errors import ConfigError, RecordError
from nextstate.records import Json
from nextstate.sampling import Sampling
from nextstate.wire import json_object

_TAKEN = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
"""Those that vLLM takes from a model's generation_config.json."""
_FILE = "generation_config.json"
EXPLICIT: Json = {
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0},
}
"""Settings that change nothing, whatever the engine's own ones are."""


def sampling_defaults(config: EngineConfig) -> Json:
    """The model's own settings as vLLM uses them, without those that change nothing.

    They come from the model's generation_config.json, or from where `[engine] args` say. Of an
    external engine the same is assumed for its `model`; the learner notices where it is wrong.
    Raises ConfigError if the arguments or the file cannot be read.
    """
    source = config.option("--generation-config") or "auto"
    found: Json = {}
    if source != "vllm":
        found = _read(config.model_path if source == "auto" else source)
    override = config.option("--override-generation-config")
    if override is not None:
        try:
            found |= cast("Json", json.loads(override))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"[engine] args: --override-generation-config {override!r}: expected a JSON object"
            ) from error
    given = {name: found[name] for name in _TAKEN if found.get(name) is not None}
    neutral = Sampling()
    try:
        held = Sampling.read(given)
    except RecordError as error:
        raise ConfigError(
            f"the sampling defaults of [engine] model: {error}: {error.__cause__}"
        ) from error
    return {name: given[name] for name in given if getattr(held, name) != getattr(neutral, name)}


def _read(model: str) -> Json:
    file = Path(model).expanduser() / _FILE
    if not Path(model).expanduser().is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(model, _FILE)
        except ValueError:  # the form of a path
            raise ConfigError(
                f"[engine] model = {model!r:.200}: there is no such folder, and it is no name of a "
                "model, such as 'Qwen/Qwen3-0.6B': correct it"
            ) from None
        if not isinstance(cached, str):
            return {}
        file = Path(cached)
    try:
        found = json_object(file.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if found is None:
        raise ConfigError(f"{file}: expected a JSON object; vLLM takes its sampling defaults here")
    return found
