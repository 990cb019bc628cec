"""The one TOML file, read strictly into frozen dataclasses.

Each folder owns the dataclass of its section; nextstate/app/settings.py passes them here. The keys
are the fields of that class itself; what it inherits is its recipe, which only code sets. An
unknown key is an error that names the most similar key. Values are checked against their type.
"""

from __future__ import annotations

import codecs
import difflib
import functools
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from annotated_types import Ge

from nextstate.errors import ConfigError
from nextstate.redaction import KINDS, Redactor
from nextstate.redaction.patterns import compile_patterns

if TYPE_CHECKING:
    from pydantic import TypeAdapter

DEFAULT_FILE = Path("nextstate.toml")


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """`[store]`: where everything that was recorded is kept."""

    dir: str = "~/.nextstate"
    """State folder: the database, adapters, checkpoints and logs, readable by its owner only."""
    url: str = ""
    """Another place for the database: sqlite:///PATH, or postgresql://USER@HOST:PORT/NAME of a
    server that several machines share. Empty means SQLite in `dir`."""

    @property
    def path(self) -> Path:
        """`dir`, expanded and absolute. Raises ConfigError if it cannot name a folder."""
        if not self.dir.strip() or "\0" in self.dir:
            raise ConfigError(f"[store] dir = {self.dir!r}: expected the path of a folder")
        try:
            return Path(self.dir).expanduser().absolute()
        except RuntimeError as error:  # "~nobody"
            raise ConfigError(
                f"[store] dir = {self.dir!r}: {error}; write the whole path"
            ) from None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`[engine]`: the vLLM server behind the proxy."""

    mode: Literal["managed", "external"] = "managed"
    model: str = "Qwen/Qwen3-4B-Instruct-2507"
    """A folder with weights, or a hub name that is already in the local cache."""
    served_model_name: str = ""
    """The model name that clients send; empty means `model`."""
    url: str | tuple[str, ...] = ""
    """External mode: the server's address, or those of several that serve the same model."""
    replicas: Annotated[int, Ge(1)] = 1
    """Managed mode: how many servers are started; each conversation stays on one of them."""
    api_key_env: str = ""
    """Environment variable with the engine's key; empty: a managed engine gets a new key."""
    dtype: str = "auto"
    max_model_len: int = 0
    """Tokens of context; 0: the model's own limit, or what its memory holds."""
    args: tuple[str, ...] = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    """More arguments for vLLM's server, as on its command line."""
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """More environment variables for vLLM's server. It gets the shell's, except `VLLM_*`."""

    def __post_init__(self) -> None:
        if isinstance(self.url, tuple):
            object.__setattr__(self, "url", tuple(map(server_address, self.url)))
            if twice := [url for url in self.urls if self.urls.count(url) > 1]:
                raise ConfigError(f"[engine] url names {twice[0]!r} twice: name each server once")
        elif self.url:
            object.__setattr__(self, "url", server_address(self.url))
        if self.replicas > 1 and self.mode == "external":
            raise ConfigError(
                f"[engine] replicas = {self.replicas} is for vLLM servers that `nextstate up` "
                'starts: with mode = "external" list the addresses of yours as [engine] url'
            )
        for word in self.args:
            if word.replace("_", "-").startswith("--trust"):
                raise ConfigError(
                    f"[engine] args: {word!r:.60} would run code that comes with a model, with "
                    "your rights: remove it, and choose a model whose code vLLM has"
                )

    @property
    def urls(self) -> tuple[str, ...]:
        """External mode: the addresses of all servers."""
        return self.url if isinstance(self.url, tuple) else (self.url,) * bool(self.url)

    @property
    def parts(self) -> tuple[str, ...]:
        """Managed mode: what the supervisor calls the servers."""
        if self.replicas == 1:
            return ("engine",)
        return tuple(f"engine-{number}" for number in range(self.replicas))

    @property
    def name(self) -> str:
        """The base model's name in requests."""
        return self.served_model_name or self.model

    @property
    def model_path(self) -> str:
        """`model`; an absolute path if it is a folder on this machine."""
        path = Path(self.model).expanduser()
        return str(path.absolute()) if path.exists() else self.model

    def option(self, name: str) -> str | None:
        """The value of one of vLLM's options in `args`; the last one counts.

        >>> EngineConfig(args=("--seed", "1", "--logprobs_mode=x")).option("--logprobs-mode")
        'x'
        """
        found = None
        for word, following in zip(self.args, (*self.args, None)[1:], strict=True):
            option, _, value = word.partition("=")
            if option.replace("_", "-") == name:
                found = value if "=" in word else following
        return found


_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")


@dataclass(frozen=True, slots=True)
class PrivacyConfig:
    """`[privacy]`: what may be kept, and what may leave this machine."""

    record: bool = True
    """False relays without recording: the agent works, nothing is learned."""
    allow_hosts: tuple[str, ...] = ()
    """Names or addresses of hosts that our processes may reach besides this machine and [engine]
    url: a judge's, or api.wandb.ai. Naming a host is the consent to send something there."""
    redact: tuple[str, ...] = KINDS
    """Kinds of secrets and personal data that are replaced before anything is kept."""
    patterns: tuple[str, ...] = ()
    """Regular expressions of your own for what is replaced too."""

    @property
    def redactor(self) -> Redactor:
        """What replaces secrets, as `redact` and `patterns` ask for. Raises ConfigError."""
        return Redactor(frozenset(self.redact), compile_patterns(self.patterns))

    def __post_init__(self) -> None:
        for kind in self.redact:
            if kind not in KINDS:
                raise ConfigError(
                    f"[privacy] redact: unknown kind {kind!r:.80}; {nearest(kind, KINDS)}"
                )
        compile_patterns(self.patterns)
        for host in self.allow_hosts:
            if not _HOST.fullmatch(host):
                raise ConfigError(
                    f"[privacy] allow_hosts: {host!r:.100} is neither a host's name, such as "
                    '"api.example.com", nor an address; give it without scheme, port and path'
                )


_ROUTE = re.compile(
    r"/v1(/(chat(/completions)?|completions|embeddings|messages|models|responses))?$"
)


def server_address(url: str) -> str:
    """An OpenAI server's address without the route that clients often append.

    Raises ConfigError for an invalid address.

    >>> server_address("http://127.0.0.1:8000/v1/"), server_address("https://h/x/v1/models")
    ('http://127.0.0.1:8000', 'https://h/x')
    """
    address = _ROUTE.sub("", url.strip().rstrip("/")).rstrip("/")
    if not _is_address(address):
        raise ConfigError(
            f"[engine] url = {url!r}: expected http://HOST:PORT or https://HOST, without what "
            "follows /v1"
        )
    return address


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        host = (parts.hostname or "").encode("idna")
        named = parts.scheme in ("http", "https") and bool(host) and parts.port != 0
    except ValueError:
        return False
    return named and not parts.query and not parts.fragment and not re.search(r"[\s\\]", text)


def read_sections(
    path: Path,
    sections: Mapping[str, type],
    overrides: Mapping[str, Mapping[str, object]],
    groups: Mapping[str, type],
) -> dict[str, Any]:
    """Reads the file into one instance per section, and `{NAME: instance}` per group.

    `[lineages.alice]` is the entry `alice` of the group `lineages`. `overrides`
    ({section: {key: value}}) replace values of the file. If the default file is missing, all
    defaults hold. Raises ConfigError for a missing named file, an unknown key or a wrong value.
    """
    raw = _read(path)
    _refuse_unknown(raw, {**sections, **groups}, str(path), "section")
    result: dict[str, Any] = {}
    for name, kind in sections.items():
        values = raw.get(name, {})
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path}: {name} is a value, expected a section [{name}]")
        result[name] = _section(name, kind, {**values, **overrides.get(name, {})}, str(path))
    for name, kind in groups.items():
        entries = raw.get(name, {})
        if not isinstance(entries, Mapping):
            raise ConfigError(f"{path}: {name} is a value, expected sections [{name}.NAME]")
        result[name] = {}
        for entry, values in cast("Mapping[str, Any]", entries).items():
            section = f"{name}.{entry}"
            if not isinstance(values, Mapping):
                raise ConfigError(f"{path}: {section} is a value, expected a section [{section}]")
            result[name][entry] = _section(section, kind, cast("Any", values), str(path))
    return result


def _read(path: Path) -> dict[str, Any]:
    """The file's content; {} if the default file is missing. Raises ConfigError."""
    try:
        return tomllib.loads(_decoded(path.read_bytes()))
    except FileNotFoundError:
        if path == DEFAULT_FILE:
            return {}
        raise ConfigError(
            f"there is no file {path}: copy config.example.toml there, or name another with "
            "--config FILE"
        ) from None
    except RecursionError:
        raise ConfigError(f"{path} is not valid TOML: it is nested too deep") from None
    except ValueError as error:  # also an integer with too many digits, a NUL in the path
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _decoded(data: bytes) -> str:
    """UTF-8 text, with or without a byte order mark. Raises ValueError for other encodings."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        raise ValueError("it is in UTF-16 or UTF-32; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise ValueError(f"line {line} has the byte 0x{byte:02x}; save it as UTF-8") from None


def keys(kind: type) -> list[str]:
    """The fields that the file may set: those of the class itself, not of its bases."""
    return [f.name for f in fields(kind) if f.name in kind.__annotations__]


@functools.cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    """What checks a section; to make it takes a millisecond."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _section(name: str, kind: type, values: Mapping[str, Any], where: str) -> Any:
    from pydantic import ValidationError  # imported late: slow, and only needed here

    if not is_dataclass(kind):
        raise TypeError(f"section {name} is described by {kind!r}, not by a dataclass")
    known = keys(kind)
    for fixed in (f for f in fields(kind) if f.name in values and f.name not in known):
        raise ConfigError(
            f"{where}: [{name}] {fixed.name} is no key: it is always {fixed.default!r}; remove it"
        )
    _refuse_unknown(values, known, f"{where}: [{name}]", "key")
    try:
        return _adapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        # Of a value of two types, `loc` also names the type.
        key = ".".join(str(part) for part in first["loc"] if part != "str")
        raise ConfigError(
            f"{where}: [{name}] {key} = {first['input']!r}: {first['msg'][0].lower()}"
            f"{first['msg'][1:]}; set [{name}] {key} in {where}"
        ) from None


def _refuse_unknown(
    values: Mapping[str, object], known: Collection[str], where: str, what: str
) -> None:
    for key in values:
        if key in known:
            continue
        raise ConfigError(f"{where} has an unknown {what} {key!r}; {nearest(key, known)}")


def nearest(key: str, known: Iterable[str]) -> str:
    """The advice for an unknown key: the most similar known key, or all known keys.

    >>> nearest("prot", ["host", "port"]), nearest("x", ["host", "port"])
    ("did you mean 'port'?", 'known: host, port')
    """
    names = list(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def secret(env_name: str, key: str) -> str | None:
    """The secret in the environment variable that configuration key `key` names, or None.

    Raises ConfigError if the variable is named but not set.
    """
    if not env_name:
        return None
    value = os.environ.get(env_name)
    if not value:
        raise ConfigError(
            f"{key} = {env_name!r}, but the environment variable {env_name} is not set: "
            f"export {env_name}=… or empty the key"
        )
    return value
