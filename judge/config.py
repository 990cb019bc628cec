"""`[judge]`: who votes on turns, how often, within which bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from nextstate.config import secret
from nextstate.errors import ConfigError
from nextstate.hooks import JudgeSettings

VoteRule = Literal["majority", "consensus"]


@dataclass(frozen=True, slots=True)
class JudgeConfig:
    """The keys of `[judge]`."""

    kind: str = "engine"
    """A file of plugins/judges/ (`engine`, `litellm`, `rules`, `outcome`) or a `module:function`;
    several, with commas, are a chain: each is asked in turn until one is sure."""
    model: str = ""
    """The judge's model; empty means the engine's base model. The kinds of a chain share it."""
    base_url: str = ""
    """An OpenAI-compatible address ending in /v1; empty means the engine's or the provider's."""
    api_key_env: str = ""
    """Environment variable with the judge's key."""
    votes: Annotated[int, Ge(1)] = 3
    """Independent votes a turn; a kind that is deterministic is asked once."""
    vote_rule: VoteRule = "majority"
    """How votes become a score; consensus is 0 unless more than half of all pairs agree on it."""
    hints: Annotated[int, Ge(1)] = 1
    """Different hints of a turn that are kept; of several the learner takes the one under which
    the teacher differs most usefully from the policy, at a forward pass each."""
    parallel: Annotated[int, Ge(1)] = 8
    """Turns judged at the same time; each asks for its votes at once."""
    timeout_s: Annotated[float, Gt(0)] = 60.0
    """Seconds that one vote may take."""
    max_tokens: Annotated[int, Ge(1)] = 512
    """Tokens that one vote may use."""
    temperature: Annotated[float, Ge(0)] = 0.6
    """Above 0, so that votes are independent."""
    lease_s: Annotated[float, Gt(0)] = 300.0
    """Seconds after which another judge may take over a turn; more than two votes take."""
    retry_initial_s: Annotated[float, Gt(0)] = 5.0
    """Wait after a turn's first attempt without a valid vote; doubles with each further one."""
    retry_max_s: Annotated[float, Gt(0)] = 3600.0
    """The longest such wait; a turn is never given up and never charged to the policy."""
    share: Annotated[float, Gt(0), Le(1)] = 0.02
    """Of the time, how much votes may take on the engine while agents use it; 1 holds nothing
    back. It counts for the kind `engine` on a vLLM that serves agents too."""
    calls_per_hour: Annotated[int, Ge(0)] = 0
    """Votes that may be asked for in any hour; 0 is no limit."""
    tokens_per_hour: Annotated[int, Ge(0)] = 0
    """Prompt and completion tokens that votes may take in any hour; 0 is no limit. What is under
    way when it is reached still ends."""
    tail_messages: Annotated[int, Ge(1)] = 6
    """How many of the request's last messages the judge sees."""
    max_chars: Annotated[int, Ge(200)] = 6000
    """Characters shown of one text; the request's tail and the next states get twice that each."""
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """More fields of the judge's chat request, such as `priority = 10` for a vLLM that runs with
    `--scheduling-policy priority` (it refuses the field otherwise)."""

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
        if self.lease_s <= 2 * self.timeout_s:
            raise ConfigError(
                f"[judge] lease_s = {self.lease_s} must be more than twice timeout_s = "
                f"{self.timeout_s}, or a turn is judged again while its votes are under way; "
                "raise lease_s"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names in `kind`, in the order in which they are asked."""
        return tuple(name.strip() for name in self.kind.split(","))

    @property
    def on_engine(self) -> bool:
        """Whether votes are asked of the engine that serves the policy."""
        return "engine" in self.kinds and not self.base_url


def plugin_settings(
    config: JudgeConfig,
    model: str = "",
    base_url: str = "",
    extra: Mapping[str, Any] | None = None,
    api_key: str | None = None,
) -> JudgeSettings:
    """What the configured plugins get; `model` and `base_url`, the engine's, stand in for empty
    keys, except for litellm, which would take the engine for the provider. So do `api_key` and, for
    what `[judge] extra` does not name, `extra`, if the engine is asked: its key goes nowhere else.

    Raises ConfigError when the named key variable is not set.
    """
    if "litellm" in config.kinds:
        model = base_url = ""
    return JudgeSettings(
        model=config.model or model,
        base_url=config.base_url or base_url,
        api_key=secret(config.api_key_env, "[judge] api_key_env")
        or (api_key if config.on_engine else None),
        timeout_s=config.timeout_s,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        extra={**((config.on_engine and extra) or {}), **config.extra},
    )
