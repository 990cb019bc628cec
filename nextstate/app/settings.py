"""All sections of one configuration file: read once, checked together, passed on as values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from yarl import URL

from judge.config import JudgeConfig
from learner.config import LearnerConfig
from nextstate.config import (
    DEFAULT_FILE,
    EngineConfig,
    PrivacyConfig,
    StoreConfig,
    read_sections,
)
from nextstate.egress import METRICS_HOST, is_here
from nextstate.errors import ConfigError
from nextstate.records import MAIN_LINEAGE, names_adapter
from proxy.config import AgentsConfig, LineageConfig, ProxyConfig
from rollout.config import RolloutConfig

_NAME = re.compile(r"[a-z0-9_-]{1,40}")
_LITELLM = re.compile(r"(?:plugins\.judges\.)?litellm(?::|\Z)")
_PROVIDERS = {
    "openai": "api.openai.com",
    "anthropic": "api.anthropic.com",
    "deepseek": "api.deepseek.com",
    "gemini": "generativelanguage.googleapis.com",
    "groq": "api.groq.com",
    "mistral": "api.mistral.ai",
    "openrouter": "openrouter.ai",
    "xai": "api.x.ai",
}
"""The hosts of litellm's providers, by the beginning of a model's name."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration."""

    file: Path
    store: StoreConfig
    engine: EngineConfig
    proxy: ProxyConfig
    agents: AgentsConfig
    judge: JudgeConfig
    learner: LearnerConfig
    rollout: RolloutConfig
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
            "rollout": RolloutConfig,
            "privacy": PrivacyConfig,
        }
        groups = {"lineages": LineageConfig}
        settings = Settings(file=file, **read_sections(file, kinds, overrides or {}, groups))
        settings.check()
        return settings

    @property
    def all_lineages(self) -> tuple[str, ...]:
        """The names of all lineages; `main`, for everyone without their own, comes first."""
        return (MAIN_LINEAGE, *self.lineages)

    @property
    def hosts(self) -> dict[str, str]:
        """The hosts that our processes may reach besides this machine, and which key says so."""
        found = {self.proxy.host: "[proxy] host"}
        found.update(dict.fromkeys(self._engine_hosts, "[engine] url"))
        found |= dict.fromkeys(_database_hosts(self.store.url), "[store] url")
        return {host: key for host, key in found.items() if not is_here(host)} | dict.fromkeys(
            self.privacy.allow_hosts, "[privacy] allow_hosts"
        )

    @property
    def _engine_hosts(self) -> list[str]:
        """The hosts of external engines."""
        urls = self.engine.urls if self.engine.mode == "external" else ()
        return [host for host in map(_host, urls) if host]

    def check(self) -> None:
        """Raises ConfigError if sections contradict each other."""
        if self.engine.mode == "external" and not self.engine.urls:
            raise ConfigError(
                '[engine] mode = "external" needs [engine] url, for example "http://127.0.0.1:8000"'
            )
        self._check_lineages()
        if self.learner.trains_all:
            self._check_whole_models()
        if self.learner.wandb and METRICS_HOST not in self.privacy.allow_hosts:
            raise ConfigError(
                f"[learner] wandb = {self.learner.wandb!r} sends metrics to Weights & Biases: "
                f'allow it by adding "{METRICS_HOST}" to [privacy] allow_hosts'
            )
        self._check_judge()

    def _check_whole_models(self) -> None:
        """Raises ConfigError for what does not go with versions that are whole models."""
        for key, wrong, why in (
            ('[engine] mode = "external"', self.engine.mode == "external", "starts no engines"),
            (f"[engine] replicas = {self.engine.replicas}", self.engine.replicas > 1, "needs more"),
            ("[lineages.NAME]", bool(self.lineages), "needs an engine for each lineage"),
            ("[rollout] environment", bool(self.rollout.environment), "lets candidates serve"),
        ):
            if wrong:
                raise ConfigError(
                    "[learner] lora_rank = 0 trains all weights, and each version has an engine of "
                    f"its own; {key} {why}: leave it out, or set lora_rank to 1 or more"
                )

    def _check_judge(self) -> None:
        """Raises ConfigError if the judge would send turns to a host that is not allowed."""
        judge, allowed = self.judge, self.privacy.allow_hosts
        if judge.base_url:
            host = _host(judge.base_url)
            if host is None:
                raise ConfigError(
                    f"[judge] base_url = {judge.base_url!r}: expected an address such as "
                    '"http://127.0.0.1:9000/v1"'
                )
            if not self._is_here(judge.base_url) and host not in allowed:
                raise ConfigError(
                    f"[judge] base_url = {judge.base_url!r} is neither this machine nor [engine] "
                    f'url, and gets every turn: allow it by adding "{host}" to [privacy] '
                    "allow_hosts"
                )
        elif any(_LITELLM.match(kind) for kind in judge.kinds):
            host = _PROVIDERS.get(judge.model.partition("/")[0] if "/" in judge.model else "openai")
            if not allowed or (host is not None and host not in allowed):
                named = f'"{host}"' if host else f'its host, such as "{_PROVIDERS["openai"]}",'
                raise ConfigError(
                    f'[judge] kind = "{judge.kind}" sends turns to the provider of its model: '
                    f"allow it by adding {named} to [privacy] allow_hosts"
                )

    def _is_here(self, url: str) -> bool:
        """True for an address on this machine or on the engine's host, which sees all turns."""
        host = _host(url)
        if host is None:
            return False
        if host in self._engine_hosts:
            return True
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

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
            if names_adapter(lineage.model):
                raise ConfigError(
                    f"{where} model = {lineage.model!r} looks like an adapter's name: choose one "
                    "that does not end in -v and six digits, or a hash after them"
                )
            if lineage.model in models:
                raise ConfigError(
                    f"{where} model = {lineage.model!r} is taken by the engine or another lineage"
                )
            models += [lineage.model] * bool(lineage.model)


def _database_hosts(url: str) -> list[str]:
    """The hosts of a PostgreSQL URL, which may name several.

    >>> _database_hosts("postgresql://me:a@b@one:1,[::2]:5432,three/name?sslmode=require")
    ['one', '::2', 'three']
    """
    if not url.startswith("postgres"):
        return []
    places = url.partition("//")[2].partition("/")[0].rpartition("@")[2].split(",")
    return [re.sub(r":\d+$", "", place).strip("[]") for place in places if place]


def _host(url: str) -> str | None:
    """The host of `url`, parsed as the judge's HTTP client parses it; None if it is invalid."""
    try:
        return URL(url).host
    except ValueError:
        return None
