"""All sections of one configuration file, read once and passed down as values."""

from __future__ import annotations

import re
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
from nextstate.records import MAIN_LINEAGE
from proxy.config import AgentsConfig, LineageConfig, ProxyConfig

_NAME = re.compile(r"[a-z0-9_-]{1,40}")
_ADAPTER = re.compile(r"\A.+-v\d{6}\Z")


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
    lineages: Mapping[str, LineageConfig]

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
        groups = {"lineages": LineageConfig}
        settings = Settings(file=file, **read_sections(file, kinds, overrides or {}, groups))
        settings.check()
        return settings

    @property
    def all_lineages(self) -> tuple[str, ...]:
        """The names of all lineages, the one of everyone else first."""
        return (MAIN_LINEAGE, *self.lineages)

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
        self._check_lineages()
        if self.learner.wandb and not self.privacy.external_metrics:
            raise ConfigError(
                f"[learner] wandb = {self.learner.wandb!r} sends metrics to Weights & Biases: "
                "allow it with [privacy] external_metrics = true"
            )
        if "litellm" in self.judge.kinds and not self.privacy.external_judge:
            raise ConfigError(
                f'[judge] kind = "{self.judge.kind}" sends turns to the provider of its model: '
                "allow it with [privacy] external_judge = true"
            )

    def _check_lineages(self) -> None:
        models = [self.engine.name]
        for name, lineage in self.lineages.items():
            where = f"[lineages.{name}]"
            if not _NAME.fullmatch(name) or name == MAIN_LINEAGE:
                raise ConfigError(
                    f"{where}: a lineage's name is 1 to 40 small letters, digits, - or _, and not "
                    f"{MAIN_LINEAGE!r}, which is everyone else's"
                )
            if not lineage.model and not lineage.api_key_env:
                raise ConfigError(f"{where} needs model or api_key_env: nothing would reach it")
            if _ADAPTER.fullmatch(lineage.model):
                raise ConfigError(
                    f"{where} model = {lineage.model!r} looks like an adapter's name: choose one "
                    "that does not end in -v and six digits"
                )
            if lineage.model in models:
                raise ConfigError(
                    f"{where} model = {lineage.model!r} is taken by the engine or another lineage"
                )
            models += [lineage.model] * bool(lineage.model)
        needed = len(self.all_lineages)
        if self.lineages and self.engine.max_loras < needed + 1:
            raise ConfigError(
                f"[engine] max_loras = {self.engine.max_loras}: {needed} lineages need at least "
                f"{needed + 1}, one for each and one for a new version"
            )
