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
from nextstate.egress import is_here
from nextstate.errors import ConfigError
from nextstate.records import MAIN_LINEAGE, names_adapter
from proxy.config import AgentsConfig, LineageConfig, ProxyConfig
from rollout.config import RolloutConfig

_NAME = re.compile(r"[a-z0-9_-]{1,40}")
_LOCAL_JUDGES = ("engine", "rules", "outcome")
_OUR_JUDGE = re.compile(r"plugins\.judges\.(\w+):create")


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
        if self.engine.mode == "external" and (host := _host(self.engine.url)):
            found[host] = "[engine] url"
        if self.judge.base_url and (host := _host(self.judge.base_url)):
            found.setdefault(host, "[judge] base_url")
        if self.learner.wandb:
            found["api.wandb.ai"] = "[learner] wandb"
        return {host: key for host, key in found.items() if not is_here(host)} | dict.fromkeys(
            self.privacy.allow_hosts, "[privacy] allow_hosts"
        )

    def check(self) -> None:
        """Raises ConfigError if sections contradict each other."""
        if self.engine.mode == "external" and not self.engine.url:
            raise ConfigError(
                '[engine] mode = "external" needs [engine] url, for example "http://127.0.0.1:8000"'
            )
        self._check_lineages()
        if self.learner.wandb and not self.privacy.external_metrics:
            raise ConfigError(
                f"[learner] wandb = {self.learner.wandb!r} sends metrics to Weights & Biases: "
                "allow it with [privacy] external_metrics = true"
            )
        if not self.privacy.external_judge:
            self._check_judge_stays_here()

    def _check_judge_stays_here(self) -> None:
        """Raises ConfigError if the judge may send turns to another machine."""
        kinds = [_OUR_JUDGE.sub(r"\1", kind) for kind in self.judge.kinds]
        allow = "allow it with [privacy] external_judge = true"
        for kind in kinds:
            if kind == "litellm":
                raise ConfigError(
                    f'[judge] kind = "{self.judge.kind}" sends turns to the provider of its model: '
                    f"{allow}"
                )
            if kind not in _LOCAL_JUDGES:
                raise ConfigError(
                    f'[judge] kind = "{self.judge.kind}": {kind} is not one of ours '
                    f"({', '.join(_LOCAL_JUDGES)}, litellm). If it is a plugin of yours, it may "
                    f"send turns anywhere: {allow}"
                )
        base_url = self.judge.base_url
        if "engine" in kinds and base_url and not self._is_here(base_url):
            raise ConfigError(
                f"[judge] base_url = {base_url!r} is neither this machine nor [engine] url, and "
                f"gets every turn: {allow}"
            )

    def _is_here(self, url: str) -> bool:
        """True for an address on this machine or on the engine's host, which sees all turns."""
        host = _host(url)
        if host is None:
            return False
        if self.engine.mode == "external" and host == _host(self.engine.url):
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


def _host(url: str) -> str | None:
    """The host of `url`, parsed as the judge's HTTP client parses it; None if it is invalid."""
    try:
        return URL(url).host
    except ValueError:
        return None
