"""The agents that `nextstate connect` knows, each as what it must be told of the proxy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, cast

from nextstate.app.connect.json5_edit import Item, Step
from nextstate.app.connect.target import PROVIDER, Target
from nextstate.records import Json
from nextstate.wire import obj

Edit = tuple[tuple[Step, ...], object]
"""A path in a settings file, and the value that it gets."""


@dataclass(frozen=True, slots=True)
class FileAgent:
    """An agent with a settings file."""

    name: str
    language: Literal["json5", "toml"]
    find: Callable[[Mapping[str, str], Path], Path]
    """Its settings file, by the environment and the home folder."""
    edits: Callable[[Target, Json], list[Edit]]
    """What to set, by what its file holds now."""
    needs: Callable[[Target, Json], str | None] = lambda target, found: None
    """What else a person must know or do, by what its file holds then; None if nothing."""
    plugin: Callable[[Json], list[Edit]] | None = None
    """What makes it load NextState's plugin, by what its file holds now; None if there is none."""


@dataclass(frozen=True, slots=True)
class EnvironmentAgent:
    """An agent or library that reads environment variables."""

    name: str
    variables: Callable[[Target], dict[str, str]]
    """Without its key's."""
    key_variable: str
    """The variable that it reads the key from."""
    note: str = ""
    """What its code or command line must name; `{model}` stands for the model."""


def openclaw_needs(target: Target, found: Json) -> str | None:
    is_short = _inner(found, "agents", "defaults").get("contextInjection") == "never"
    if target.context is None:
        return None
    if target.context >= OPENCLAW_CONTEXT:
        if not is_short:
            return None
        return (
            "OpenClaw's settings keep its prompts short (contextInjection, skills, tools.deny), "
            "and this model has room for long ones: to give it its tools back, take them out, or "
            "use --undo and connect again"
        )
    text = (
        f"the model's context has {target.context} tokens, and OpenClaw's own prompt alone has "
        "about 15 thousand. So its prompts are made short: it talks, WITHOUT tools, skills and "
        "files of its workspace. For these serve a model with 32k tokens or more ([engine] "
        "max_model_len), use --undo, and connect again"
    )
    if target.context < _OPENCLAW_LEAST:
        text += (
            f". Even its short prompt has about {_OPENCLAW_SHORT} tokens: with {target.context} it "
            "soon forgets what was said, or cannot answer at all"
        )
    return text


def _openclaw_short(defaults: Json) -> list[Edit]:
    """Its own settings that make its prompts short: no tools, skills and files of its workspace."""
    here = ("agents", "defaults")
    edits: list[Edit] = [
        ((*here, "skipBootstrap"), True),
        ((*here, "contextInjection"), "never"),
        ((*here, "skills"), []),
    ]
    if "maxTokens" not in _inner(defaults, "params"):
        edits.append(((*here, "params", "maxTokens"), 256))
    return [*edits, (("tools", "deny", Item("*")), "*")]


def openclaw_file(env: Mapping[str, str], home: Path) -> Path:
    if file := env.get("OPENCLAW_CONFIG_PATH"):
        return Path(file)
    own_home = Path(env.get("OPENCLAW_HOME") or home)
    return Path(env.get("OPENCLAW_STATE_DIR") or own_home / ".openclaw") / "openclaw.json"


def openclaw_edits(target: Target, found: Json) -> list[Edit]:
    provider = ("models", "providers", PROVIDER)
    model = (*provider, "models", Item(target.model))
    reference = f"{PROVIDER}/{target.model}"
    edits: list[Edit] = [
        ((*provider, "baseUrl"), target.api),
        ((*provider, "apiKey"), target.written_key),
        ((*provider, "api"), "openai-completions"),
        ((*model, "name"), f"{target.model}, learning"),
    ]
    if target.context:
        edits.append(((*model, "contextWindow"), target.context))
    # With these two OpenClaw names its sessions in each request.
    edits.append(((*model, "compat", "supportsPromptCacheKey"), True))
    edits.append(((*model, "compat", "sendSessionAffinityHeaders"), True))
    defaults = _inner(found, "agents", "defaults")
    chosen = ("agents", "defaults", "model")
    if target.context and target.context < OPENCLAW_CONTEXT:
        edits += _openclaw_short(defaults)
    plain = isinstance(defaults.get("model"), str)
    edits.append((chosen if plain else (*chosen, "primary"), reference))
    if _inner(defaults, "modelPolicy").get("allow"):  # an empty list allows every model
        allow = ("agents", "defaults", "modelPolicy", "allow", Item(reference))
        edits.append((allow, reference))
    return edits


def openclaw_plugin(found: Json) -> list[Edit]:
    """The plugin is loaded from where it lies: `openclaw plugins install` drops all comments."""
    plugins = _inner(found, "plugins")
    folder = str(files("plugins") / "agents" / "openclaw")
    known = _inner(plugins, "load").get("paths")
    paths = cast("list[object]", known) if isinstance(known, list) else []
    earlier = [path for path in paths if isinstance(path, str) and _is_plugin(path)]
    entry = ("plugins", "entries", PROVIDER)
    edits: list[Edit] = [
        (("plugins", "load", "paths", Item(earlier[0] if earlier else folder)), folder),
        ((*entry, "enabled"), True),
        # Without it OpenClaw does not tell a plugin what started a turn.
        ((*entry, "hooks", "allowConversationAccess"), True),
    ]
    if plugins.get("allow"):
        edits.append((("plugins", "allow", Item(PROVIDER)), PROVIDER))
    return edits


def _is_plugin(path: str) -> bool:
    """Whether it is the plugin, perhaps of a NextState that was installed elsewhere."""
    return Path(path).parts[-3:] == ("plugins", "agents", "openclaw")


def codex_edits(target: Target, found: Json) -> list[Edit]:
    provider = ("model_providers", PROVIDER)
    edits: list[Edit] = [
        (("model",), target.model),
        (("model_provider",), PROVIDER),
        ((*provider, "name"), "NextState"),
        ((*provider, "base_url"), target.api),
        ((*provider, "wire_api"), "responses"),
    ]
    if target.context:
        edits.insert(2, (("model_context_window",), target.context))
    if target.key_variable:
        edits.append(((*provider, "env_key"), target.key_variable))
    return edits


def qwen_edits(target: Target, found: Json) -> list[Edit]:
    model = ("modelProviders", PROVIDER, Item(target.model))
    key = target.key_variable or "NEXTSTATE_KEY"
    edits: list[Edit] = [
        # qwen-code would add its version itself to a new file, and the file could not be undone.
        *([] if found else [(("$version",), _QWEN_VERSION)]),
        (("providerProtocol", PROVIDER), "openai"),
        ((*model, "name"), f"{target.model}, learning"),
        ((*model, "baseUrl"), target.api),
        ((*model, "envKey"), key),
    ]
    if target.context:
        edits.append(((*model, "generationConfig", "contextWindowSize"), target.context))
    edits.append((("env", key), target.written_key))
    edits.append((("security", "auth", "selectedType"), "openai"))
    edits.append((("model", "name"), target.model))
    return edits


def opencode_file(env: Mapping[str, str], home: Path) -> Path:
    if file := env.get("OPENCODE_CONFIG"):
        return Path(file)
    folder = Path(env.get("XDG_CONFIG_HOME") or home / ".config") / "opencode"
    commented = folder / "opencode.jsonc"
    return commented if commented.exists() else folder / "opencode.json"


def opencode_edits(target: Target, found: Json) -> list[Edit]:
    provider = ("provider", PROVIDER)
    model = (*provider, "models", target.model)
    edits: list[Edit] = [
        # opencode would add this itself, and the file could not be undone.
        (("$schema",), found.get("$schema", "https://opencode.ai/config.json")),
        ((*provider, "npm"), "@ai-sdk/openai-compatible"),
        ((*provider, "name"), "NextState"),
        ((*provider, "options", "baseURL"), target.api),
        ((*provider, "options", "apiKey"), target.written_key),
        ((*model, "name"), f"{target.model}, learning"),
    ]
    if target.context:
        edits.append(((*model, "limit", "context"), target.context))
        edits.append(((*model, "limit", "output"), target.context // 4))
    edits.append((("model",), f"{PROVIDER}/{target.model}"))
    return edits


def _inner(data: Json, *path: str) -> Json:
    """The object at the path; {} if there is none."""
    for step in path:
        data = obj(data.get(step))
    return data


def _openai(target: Target) -> dict[str, str]:
    return {"OPENAI_BASE_URL": target.api}


_LITELLM = "OPENAI_API_BASE"
OPENCLAW_CONTEXT = 32_000
"""Tokens of context with which OpenClaw is useful as it is."""
_OPENCLAW_SHORT, _OPENCLAW_LEAST = 2_000, 6_000
_QWEN_VERSION = 4

FILE_AGENTS = (
    FileAgent("openclaw", "json5", openclaw_file, openclaw_edits, openclaw_needs, openclaw_plugin),
    FileAgent(
        "codex",
        "toml",
        lambda env, home: Path(env.get("CODEX_HOME") or home / ".codex") / "config.toml",
        codex_edits,
        lambda target, _: (
            f"codex reads the key from ${target.key_variable}: export it in the shell that "
            "starts codex"
            if target.key_variable
            else None
        ),
    ),
    FileAgent("qwen-code", "json5", lambda _, home: home / ".qwen" / "settings.json", qwen_edits),
    FileAgent("opencode", "json5", opencode_file, opencode_edits),
)
ENVIRONMENT_AGENTS = (
    EnvironmentAgent(
        "claude-code",
        lambda target: {
            "ANTHROPIC_BASE_URL": target.url,
            "ANTHROPIC_MODEL": target.model,
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": target.model,
            **({"CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(target.context)} if target.context else {}),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
        "ANTHROPIC_API_KEY",
    ),
    EnvironmentAgent(
        "aider",
        lambda target: {_LITELLM: target.api, "AIDER_MODEL": f"openai/{target.model}"},
        "OPENAI_API_KEY",
    ),
    EnvironmentAgent(
        "mini-swe-agent",
        lambda target: {
            _LITELLM: target.api,
            "MSWEA_MODEL_NAME": f"openai/{target.model}",
            "MSWEA_CONFIGURED": "true",
            "MSWEA_COST_TRACKING": "ignore_errors",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it fetches a price list
        },
        "OPENAI_API_KEY",
    ),
    EnvironmentAgent(
        "open-webui", lambda target: {"OPENAI_API_BASE_URL": target.api}, "OPENAI_API_KEY"
    ),
    EnvironmentAgent(
        "langchain",
        lambda target: {_LITELLM: target.api},
        "OPENAI_API_KEY",
        'ChatOpenAI(model="{model}")',
    ),
    EnvironmentAgent(
        "openai-agents",
        lambda target: {
            **_openai(target),
            "OPENAI_DEFAULT_MODEL": target.model,
            # Traces would go to OpenAI with what was said.
            "OPENAI_AGENTS_DISABLE_TRACING": "1",
        },
        "OPENAI_API_KEY",
    ),
    EnvironmentAgent("pydantic-ai", _openai, "OPENAI_API_KEY", 'Agent("openai-chat:{model}")'),
    EnvironmentAgent(
        "litellm",
        lambda target: {_LITELLM: target.api},
        "OPENAI_API_KEY",
        'completion(model="openai/{model}", …)',
    ),
)
AGENTS = (*FILE_AGENTS, *ENVIRONMENT_AGENTS)
