"""The sampling settings that vLLM takes from the model, as the proxy knows them."""

import json
from pathlib import Path

import pytest

from nextstate.config import EngineConfig
from nextstate.engine.defaults import sampling_defaults
from nextstate.errors import ConfigError

QWEN3 = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


def model(folder: Path, **settings: object) -> str:
    folder.mkdir()
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_they_are_those_of_the_models_generation_config(tmp_path: Path) -> None:
    path = model(tmp_path / "m", **QWEN3, min_p=0.0, repetition_penalty=1.0, eos_token_id=2)
    assert sampling_defaults(EngineConfig(model=path)) == QWEN3
    external = EngineConfig(mode="external", url="http://127.0.0.1:1", model=path)
    assert sampling_defaults(external) == QWEN3


def test_a_model_without_the_file_has_none(tmp_path: Path) -> None:
    assert sampling_defaults(EngineConfig(model=str(tmp_path))) == {}
    assert sampling_defaults(EngineConfig(model="nobody/no-such-model")) == {}


def test_arguments_of_the_engine_replace_them(tmp_path: Path) -> None:
    path = model(tmp_path / "m", **QWEN3)
    other = model(tmp_path / "other", temperature=0.3)

    def found(*args: str) -> dict[str, object]:
        return sampling_defaults(EngineConfig(model=path, args=args))

    assert found("--generation-config", "vllm") == {}
    assert found(f"--generation_config={other}") == {"temperature": 0.3}
    override = "--override-generation-config"
    assert found(override, '{"top_k": -1, "min_p": 0.1}') == {
        **{"temperature": 0.7, "top_p": 0.8},
        "min_p": 0.1,
    }
    with pytest.raises(ConfigError, match="--override-generation-config"):
        found(override, "warm")
    (tmp_path / "m" / "generation_config.json").write_text('{"temperature": "warm"}')
    with pytest.raises(ConfigError, match="warm"):
        found()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[engine\] model = '.*gone': there is no such folder"):
        sampling_defaults(EngineConfig(model=str(tmp_path / "gone")))
