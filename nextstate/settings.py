"""All sections of one configuration file, read once and passed down as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from judge.config import JudgeConfig
from learner.config import LearnerConfig
from nextstate.config import (
    DEFAULT_FILE,
    EngineConfig,
    PrivacyConfig,
    StoreConfig,
    read_sections,
)
from nextstate.errors import ConfigError
from proxy.config import AgentsConfig, ProxyConfig


@dataclass(frozen=True, slots=True)
class Settings:
    """The composed configuration."""

    file: Path
    store: StoreConfig
    engine: EngineConfig
    proxy: ProxyConfig
    agents: AgentsConfig
    judge: JudgeConfig
    learner: LearnerConfig
    privacy: PrivacyConfig

    @staticmethod
    def read(
        file: Path = DEFAULT_FILE, overrides: Mapping[str, Mapping[str, object]] | None = None
    ) -> Settings:
        """Reads and checks `file`. Raises ConfigError."""
        kinds = {
            "store": StoreConfig,
            "engine": EngineConfig,
            "proxy": ProxyConfig,
            "agents": AgentsConfig,
            "judge": JudgeConfig,
            "learner": LearnerConfig,
            "privacy": PrivacyConfig,
        }
        settings = Settings(file=file, **read_sections(file, kinds, overrides or {}))
        settings.check()
        return settings

    def check(self) -> None:
        """Raises ConfigError for sections that contradict each other."""
        if self.engine.mode == "external" and not self.engine.url:
            raise ConfigError(
                '[engine] mode = "external" needs [engine] url, for example "http://127.0.0.1:8000"'
            )
        if self.learner.lora_rank > self.engine.max_lora_rank:
            raise ConfigError(
                f"[learner] lora_rank = {self.learner.lora_rank} is more than [engine] "
                f"max_lora_rank = {self.engine.max_lora_rank}: vLLM would refuse the adapters"
            )
        if self.judge.kind == "litellm" and not self.privacy.external_judge:
            raise ConfigError(
                '[judge] kind = "litellm" sends turns to the provider of its model: '
                "allow it with [privacy] external_judge = true"
            )
