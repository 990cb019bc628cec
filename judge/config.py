"""`[judge]`: who votes on turns, how often, and within which limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from judge.advantages import CreditMethod
from nextstate.config import secret
from nextstate.errors import ConfigError
from nextstate.hooks import JudgeSettings, TrainedJudge


@dataclass(frozen=True, slots=True)
class JudgeRecipe:
    """What nobody needs to choose. No file sets it; benchmarks and tests may, in code."""

    parallel: Annotated[int, Ge(1)] = 8
    """Turns judged at the same time. All votes on a turn are asked for at once."""
    temperature: Annotated[float, Ge(0)] = 0.6
    """Above 0, so that votes are independent."""
    max_chars: Annotated[int, Ge(200)] = 6000
    """Characters shown of one text. The request's last messages may use twice as many in all, and
    so may the next states."""
    credit: CreditMethod = "combined"
    """How the steps of an episode get their advantages; see `judge/advantages.py`."""
    look_s: Annotated[float, Gt(0)] = 1.0
    """Seconds between two looks at the groups of episodes that wait."""


@dataclass(frozen=True, slots=True)
class JudgeConfig(JudgeRecipe):
    """The keys of `[judge]`."""

    kind: str = "engine"
    """A file of plugins/judges/ (`engine`, `litellm`, `rules`, `outcome`) or a `module:function`.
    Several names with commas between them are a chain: each is asked until one is sure."""
    model: str = ""
    """The judge's model; empty means the engine's base model. All kinds of a chain use it."""
    base_url: str = ""
    """An OpenAI-compatible address ending in /v1; empty means the engine's or the provider's."""
    api_key_env: str = ""
    """Environment variable with the judge's key."""
    votes: Annotated[int, Ge(1)] = 3
    """Independent votes on each turn that are written out. A vote that is read from log-probs, or
    of a kind without a model, would be the same again: it is asked for once."""
    timeout_s: Annotated[float, Gt(0)] = 60.0
    """Seconds that one vote may take."""
    max_tokens: Annotated[int, Ge(1)] = 512
    """Tokens that one hint, or one vote that is written out, may use."""
    share: Annotated[float, Gt(0), Le(1)] = 0.02
    """The share of the time that votes may take on the engine while agents use it; 1 means no
    limit. It holds for the kind `engine` on the vLLM that serves the agents."""
    calls_per_hour: Annotated[int, Ge(0)] = 0
    """The most votes in any hour; 0 means no limit."""
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """More fields of the judge's chat request, such as `priority = 10`. A vLLM refuses that field
    unless it runs with `--scheduling-policy priority`."""

    def __post_init__(self) -> None:
        if 0 < self.calls_per_hour < self.votes:
            raise ConfigError(
                f"[judge] calls_per_hour = {self.calls_per_hour} does not pay for one turn of "
                f"votes = {self.votes}: raise calls_per_hour, or ask for fewer votes"
            )
        if not all(self.kinds) or len(set(self.kinds)) < len(self.kinds):
            raise ConfigError(
                f"[judge] kind = {self.kind!r}: expected one name, or different ones with commas "
                'between them, such as "rules,engine"'
            )
        if {"engine", "litellm"} <= set(self.kinds):
            raise ConfigError(
                f"[judge] kind = {self.kind!r}: engine and litellm cannot share [judge] model, "
                "base_url and api_key_env; name one of them"
            )

    @property
    def lease_s(self) -> float:
        """Seconds after which another judge may take over a turn: more than its votes can take."""
        return 5 * self.timeout_s

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names in `kind`, in the order in which they are asked."""
        return tuple(name.strip() for name in self.kind.split(","))

    @property
    def on_engine(self) -> bool:
        """Whether votes are asked of the engine that serves the policy."""
        return "engine" in self.kinds and not self.base_url

    @property
    def uses_base(self) -> bool:
        """Whether votes are asked of the engine's base model, for which a judge can be trained."""
        return self.on_engine and not self.model


def plugin_settings(
    config: JudgeConfig,
    model: str = "",
    engines: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    api_key: str | None = None,
    hints: bool = True,
    trained: Callable[[], TrainedJudge | None] = lambda: None,
) -> JudgeSettings:
    """The settings of the configured plugins, filled up from the engine's.

    `model` and the addresses of `engines`, without /v1, replace empty keys, except for litellm,
    which would take the engine for a provider. `api_key` and the fields of `extra` are used only
    where the votes go to the engine, and a judge that was `trained` only in the place of the
    engine's base model.

    Raises ConfigError when the environment variable `[judge] api_key_env` is not set.
    """
    if "litellm" in config.kinds:
        model, engines = "", ()
    servers = (config.base_url,) if config.base_url else tuple(f"{url}/v1" for url in engines)
    return JudgeSettings(
        model=config.model or model,
        base_url=servers[0] if servers else "",
        further_urls=servers[1:],
        api_key=secret(config.api_key_env, "[judge] api_key_env")
        or (api_key if config.on_engine else None),
        timeout_s=config.timeout_s,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        extra={**((config.on_engine and extra) or {}), **config.extra},
        hints=hints,
        trained=trained if config.uses_base else lambda: None,
    )
