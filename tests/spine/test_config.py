"""The configuration file: strict, and its example complete."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from judge.config import JudgeConfig
from learner.config import LearnerConfig
from nextstate.app.settings import Settings
from nextstate.config import keys, secret
from nextstate.errors import ConfigError
from proxy.config import LineageConfig

EXAMPLE = Path(__file__).parents[2] / "config.example.toml"


def settings_from(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "n.toml"
    file.write_text(text)
    return Settings.read(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[engine]\nmodell = 'x'", "unknown key 'modell'; did you mean 'model'?"),
        ("[engin]\nmodel = 'x'", "unknown section 'engin'; did you mean 'engine'?"),
        ("[engine]\nmode = 'fast'", "should be 'managed' or 'external'"),
        ("[proxy]\nport = 'x'", r"\[proxy\] port = 'x'"),
        ("[proxy]\nport = 70000", "expected 0 to 65535"),
        ("[engine]\nmode = 'external'", r"needs \[engine\] url"),
        ("[engine]\nmode = 'external'\nurl = []", r"needs \[engine\] url"),
        ("[engine]\nurl = 5", r"\[engine\] url = 5"),
        ("[engine]\nurl = ['http://a:1', 'b']", r"url = 'b': expected http://HOST:PORT"),
        ("[engine]\nurl = ['http://a:1', 'http://a:1/v1']", "'http://a:1' twice"),
        ("[engine]\nreplicas = 0", r"\[engine\] replicas = 0"),
        (
            "[engine]\nmode = 'external'\nreplicas = 2\nurl = 'http://a:1'",
            r"list the addresses of yours as \[engine\] url",
        ),
        ("[judge]\nkind = 'litellm'", r"adding \"api\.openai\.com\" to \[privacy\] allow_hosts"),
        (
            "[judge]\nkind = 'rules,litellm'",
            r"kind = \"rules,litellm\".*\[privacy\] allow_hosts",
        ),
        ("[learner]\nwandb = 'p'", r"adding \"api\.wandb\.ai\" to \[privacy\] allow_hosts"),
        ("[judge]\nvotes = 0", r"\[judge\] votes"),
        ("[learner]\nlora_rank = 513", r"\[learner\] lora_rank = 513"),
        ("[learner]\nlora_rank = 0\nranks = 2", "trains all weights, and ranks = 2 does not go"),
        ("[learner]\nlora_rank = 0\n[engine]\nreplicas = 2", r"\[engine\] replicas = 2 needs more"),
        (
            "[learner]\nlora_rank = 0\n[engine]\nmode = 'external'\nurl = 'http://a:1'",
            r'mode = "external" starts no engines: leave it out, or set lora_rank to 1',
        ),
        ("[learner]\nlora_rank = 0\n[lineages.a]\nmodel = 'x'", "an engine for each lineage"),
        ("[learner]\nlora_rank = 0\n[rollout]\nenvironment = 'tools'", "lets candidates serve"),
        ("[learner]\ntopk = 5", r"\[learner\] topk is no key: it is always 20; remove it"),
        ("[learner]\nmethod = 'ppo'", "'opd_topk', 'combined' or 'combined_sampled'"),
        ("[proxy]\nworkers = 2\nport = 0", "name a port"),
        ("[lineages.a]\nmodel = 'x-v000001'", "looks like an adapter"),
        (f"[lineages.a]\nmodel = 'x-v000001-{16 * 'a'}'", "looks like an adapter"),
        ("[proxy]\nworkers = 0", r"\[proxy\] workers = 0"),
        ("[lineages]\nalice = 1", r"expected a section \[lineages.alice\]"),
        ("[lineages.main]\nmodel = 'x'", "everyone else's"),
        ("[lineages.Alice]\nmodel = 'x'", "small letters"),
        ("[lineages.alice]", "needs model or api_key_env"),
        ("[lineages.alice]\nmodle = 'x'", "did you mean 'model'"),
        ("[lineages.a]\nmodel = 'x'\n[lineages.b]\nmodel = 'x'", "'x' is taken"),
        ("[store", "not valid TOML"),
        ("store = 3", r"expected a section \[store\]"),
    ],
)
def test_bad_values_name_the_key_that_fixes_them(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        settings_from(tmp_path, text)


_EXTERNAL = '[engine]\nmode = "external"\nurl = "http://gpu.lan:8000"\n[judge]\n'


def test_the_hosts_of_all_engines_may_be_reached(tmp_path: Path) -> None:
    urls = '["http://gpu1.lan:8000/v1", "http://gpu2.lan:8000"]'
    found = settings_from(tmp_path, f'[engine]\nmode = "external"\nurl = {urls}')
    assert found.engine.urls == ("http://gpu1.lan:8000", "http://gpu2.lan:8000")
    assert found.hosts == dict.fromkeys(("gpu1.lan", "gpu2.lan"), "[engine] url")


@pytest.mark.parametrize(
    ("judge", "host"),
    [
        ('base_url = "https://api.example.com/v1"', "api.example.com"),
        ('kind = "rules,engine"\nbase_url = "http://10.0.0.5:8000/v1"', "10.0.0.5"),
        ('kind = "plugins.judges.engine:create"\nbase_url = "http://b.org/v1"', "b.org"),
        ('base_url = "http://127.0.0.1@example.com/v1"', "example.com"),
        ('base_url = "http://127.0.0.1.example.com/v1"', "127.0.0.1.example.com"),
        ('base_url = "http://localhost.example.com/v1"', "localhost.example.com"),
        ('kind = "plugins.judges.litellm:create"', "api.openai.com"),
        ('kind = "rules, plugins.judges.litellm:create"', "api.openai.com"),
        ('kind = "litellm"\nmodel = "anthropic/claude"', "api.anthropic.com"),
        ('kind = "litellm"\nmodel = "rare/m"', "api.openai.com"),
        ('kind = "theirs"\nbase_url = "http://a.org/v1"', "a.org"),
    ],
)
def test_a_judge_elsewhere_names_the_host_to_allow(tmp_path: Path, judge: str, host: str) -> None:
    text = f"[judge]\n{judge}\n"
    with pytest.raises(ConfigError, match=rf'adding .*"{re.escape(host)}".*allow_hosts'):
        settings_from(tmp_path, text)
    settings_from(tmp_path, text + f'[privacy]\nallow_hosts = ["{host}"]\n')


@pytest.mark.parametrize("address", ["example.com/v1", "http://[::1/v1"])
def test_a_judges_address_must_be_one(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=r"\[judge\] base_url = .*expected an address"):
        settings_from(tmp_path, f'[judge]\nbase_url = "{address}"\n')


@pytest.mark.parametrize(
    ("privacy", "expected"),
    [
        ("redact = ['mail']", r"redact: unknown kind 'mail'; did you mean 'email'"),
        ("patterns = ['(']", "patterns: '\\(' is no regular expression"),
        ("patterns = ['A+']", r"a repetition has no end below 1000; write \{1,64\} in place of \+"),
        ("patterns = ['(ab|a){2,9}']", "a group is repeated"),
        ("patterns = ['[a-z]{0,99}[a-y]{0,99}[a-x]{0,99}1']", "1000000 ways"),
        ("patterns = ['(a)\\1']", "it uses groupref"),
        ("patterns = ['a{0,9}']", "matches where nothing stands"),
        (f"patterns = ['{501 * 'a'}']", "has more than 500 characters"),
        (f"patterns = {51 * ['a']}", "has 51 expressions"),
    ],
)
def test_what_is_redacted_is_checked(tmp_path: Path, privacy: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        settings_from(tmp_path, f"[privacy]\n{privacy}\n")


def test_a_persons_own_patterns_are_redacted_beside_the_chosen_kinds(tmp_path: Path) -> None:
    text = "[privacy]\nredact = ['email']\npatterns = ['ACME-[0-9]{4,12}']\n"
    redactor = settings_from(tmp_path, text).privacy.redactor
    found = redactor.text("ACME-12345 of ann@b.org, +49 170 1234987")
    assert found == "[secret:pattern] of [secret:email], +49 170 1234987"
    assert not settings_from(tmp_path, "[privacy]\nredact = []\n").privacy.redactor


@pytest.mark.parametrize(
    "text",
    [
        '[judge]\nbase_url = "http://127.0.0.1:9000/v1"',
        '[judge]\nbase_url = "http://127.8.8.8/v1"',
        '[judge]\nbase_url = "http://localhost:9000/v1"',
        '[judge]\nbase_url = "http://[::1]:9000/v1"',
        '[judge]\nkind = "plugins.judges.rules:create"',
        '[judge]\nkind = "outcome,rules,engine"',
        _EXTERNAL + 'base_url = "http://gpu.lan:9000/v1"',
        _EXTERNAL + 'kind = "engine"',
    ],
)
def test_a_judge_on_this_machine_or_the_engines_is_allowed(tmp_path: Path, text: str) -> None:
    settings_from(tmp_path, text)


def test_a_named_file_must_exist_and_the_default_file_need_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings.read().proxy.host == "127.0.0.1"
    with pytest.raises(ConfigError, match="no file"):
        Settings.read(tmp_path / "absent.toml")


def test_the_example_names_every_key_with_its_default() -> None:
    written = tomllib.loads(EXAMPLE.read_text())
    sections = {f.name: f.type for f in fields(Settings) if f.name not in ("file", "lineages")}
    assert set(written) == set(sections)
    defaults = Settings.read(Path("nextstate.toml"))
    for section in sections:
        default = getattr(defaults, section)
        assert set(written[section]) == set(keys(type(default))), section
        example = getattr(Settings.read(EXAMPLE), section)
        assert example == default, section


def test_there_are_few_keys() -> None:
    lines = EXAMPLE.read_text().splitlines()
    found = [line for line in lines if re.match(r"(# )?\w+ = ", line)]
    assert len(found) <= 60
    assert len(keys(LearnerConfig)) <= 25
    written = tomllib.loads(EXAMPLE.read_text())
    assert len(found) == sum(map(len, written.values())) + len(fields(LineageConfig))


def test_a_recipe_is_set_in_code_and_never_by_a_file(tmp_path: Path) -> None:
    for section, kind in (("learner", LearnerConfig), ("judge", JudgeConfig)):
        fixed = {f.name for f in fields(kind)} - set(keys(kind))
        assert fixed
        for name in fixed:
            with pytest.raises(ConfigError, match=rf"\[{section}\] {name} is no key: it is always"):
                settings_from(tmp_path, f"[{section}]\n{name} = 1")
    assert LearnerConfig(topk=5).topk == 5


def test_the_example_shows_a_lineage_with_every_key(tmp_path: Path) -> None:
    text = EXAMPLE.read_text()
    shown = text[text.index("# [lineages.") :].split("\n\n")[0]
    lines = [line.removeprefix("# ") for line in shown.splitlines() if " = " in line]
    settings = settings_from(tmp_path, "\n".join(["[lineages.alice]", *lines]))
    assert set(tomllib.loads("\n".join(lines))) == {f.name for f in fields(LineageConfig)}
    assert settings.lineages["alice"].model == "alice"


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "n.toml"
    file.write_text("[proxy]\nport = 1\n")
    assert Settings.read(file, {"proxy": {"port": 2}}).proxy.port == 2


def test_a_named_secret_must_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXTSTATE_TEST_KEY", "k")
    assert secret("NEXTSTATE_TEST_KEY", "[x] y") == "k"
    assert secret("", "[x] y") is None
    monkeypatch.delenv("NEXTSTATE_TEST_KEY")
    with pytest.raises(ConfigError, match=r"\[x\] y = 'NEXTSTATE_TEST_KEY'"):
        secret("NEXTSTATE_TEST_KEY", "[x] y")
