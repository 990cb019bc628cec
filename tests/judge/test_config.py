"""What the plugins of `[judge]` get from its keys and from `[engine]`."""

from __future__ import annotations

import pytest

from judge.config import JudgeConfig, plugin_settings
from nextstate.config import EngineConfig
from nextstate.engine.process import by_priority, command
from nextstate.errors import ConfigError, JudgeError
from nextstate.hooks import JudgeSettings, load_plugin


def test_votes_on_a_managed_engine_have_a_lower_priority_than_agents() -> None:
    ours = EngineConfig(model="m")
    assert "priority" in command(ours, 1)
    assert by_priority(ours)
    assert not by_priority(EngineConfig(model="m", args=("--scheduling-policy", "fcfs")))
    own = EngineConfig(model="m", args=("--scheduling-policy=priority",))
    assert by_priority(own)
    assert command(own, 1).count("--scheduling-policy") == 0
    assert not by_priority(EngineConfig(mode="external", url="http://127.0.0.1:1", model="m"))


def test_only_votes_on_the_engine_get_the_engines_extra_fields() -> None:
    extra = {"priority": 10}
    assert plugin_settings(JudgeConfig(), "m", ["u"], extra).extra == extra
    assert plugin_settings(JudgeConfig(extra={"priority": 3}), "m", ["u"], extra).extra == {
        "priority": 3
    }
    for other in (JudgeConfig(base_url="http://x/v1"), JudgeConfig(kind="litellm")):
        assert plugin_settings(other, "m", ["u"], extra).extra == {}


@pytest.mark.parametrize("kind", ["engine", "litellm"])
def test_a_model_judge_without_a_model_says_which_key_to_set(kind: str) -> None:
    with pytest.raises(JudgeError, match=r"\[judge\] model"):
        load_plugin("judges", kind, JudgeSettings())


def test_settings_fill_empty_keys_from_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = plugin_settings(JudgeConfig(), model="base", engines=["http://engine"])
    assert (settings.model, settings.base_url, settings.api_key) == (
        "base",
        "http://engine/v1",
        None,
    )
    monkeypatch.setenv("JUDGE_KEY", "secret")
    own = plugin_settings(JudgeConfig(model="m", api_key_env="JUDGE_KEY"), model="base")
    assert (own.model, own.api_key) == ("m", "secret")
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="JUDGE_KEY"):
        plugin_settings(JudgeConfig(api_key_env="JUDGE_KEY"))
