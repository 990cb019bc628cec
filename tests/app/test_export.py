"""`nextstate export`: what is written, for whom, and that TRL trains on it as it is."""

from __future__ import annotations

import json
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from demo.course import POLICY
from nextstate.app.cli import main
from nextstate.config import StoreConfig
from nextstate.episodes import Split
from nextstate.records import Feedback, PolicyVersion, TurnKind, VersionState
from nextstate.store import Store
from nextstate.store.shares import OWNER
from tests.judge.test_groups import open_episode, take
from tests.store.test_records import add, judge, turn

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def asked(text: str, *, tools: bool = False) -> dict[str, Any]:
    request: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": text}]}
    return request | ({"tools": [TOOL]} if tools else {})


def replied(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose store holds seven turns, judged but for one, and a held-out episode."""
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n[engine]\nmodel = "{POLICY}"\n')
    with closing(Store(StoreConfig(dir=f"{tmp_path}/state"))) as store:
        add(
            store,
            turn(0, request=asked("Say hello."), reply=replied("No.")),
            turn(1, request=asked("Say hello."), reply=replied("Hello!")),
            turn(2, request=asked("Add 1 and 2."), reply=replied("4")),
            turn(
                3,
                parent="turn_2",
                request={
                    "messages": [
                        *asked("Add 1 and 2.")["messages"],
                        replied("4"),
                        {"role": "user", "content": [{"type": "text", "text": "No, add."}]},
                    ]
                },
                reply=replied("3"),
            ),
            turn(
                4,
                request=asked("Look.", tools=True),
                reply={**replied(""), "content": None, "tool_calls": [CALL]},
            ),
            turn(5, request=asked("Who are you?"), reply=replied("I")),
            turn(6, kind=TurnKind.SIDE, request=asked("title?"), reply=replied("Greeting")),
        )
        for number, score in enumerate((-1, 1, -1, 1, 1, 0)):
            assert judge(store, number, score)
        store.reviewing.give(Feedback("turn_5", -1), OWNER)
        open_episode(store, "e-1", group=None, split=Split.EVAL)
        take(store, "e-1", ("turn_held_out", [1]))
    return file


def exported(
    config: Path, capsys: pytest.CaptureFixture[str], what: str, *more: str
) -> list[dict[str, Any]]:
    out = config.with_name(f"{what}.jsonl")
    assert main(["export", what, "--out", str(out), "--config", str(config), *more]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert capsys.readouterr().out.startswith(f"{out}: {len(rows)} rows\n")
    return rows


def test_sft_has_the_praised_turns_as_conversations(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, corrected, called = exported(config, capsys, "sft")
    assert first["messages"] == [*asked("Say hello.")["messages"], replied("Hello!")]
    assert corrected["messages"][2] == {"role": "user", "content": "No, add."}
    assert called["messages"][1] == {**replied(""), "tool_calls": [CALL]}
    assert json.loads(called["tools"]) == [TOOL]


def test_kto_has_praise_and_blame_and_a_person_overrides_the_votes(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = {row["turn"]: row["label"] for row in exported(config, capsys, "kto")}
    wrong, right = ["turn_0", "turn_2", "turn_5"], ["turn_1", "turn_3", "turn_4"]
    assert labels == dict.fromkeys(wrong, False) | dict.fromkeys(right, True)


def test_dpo_pairs_two_answers_to_one_request_and_a_corrected_one_with_its_redo(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, redone = exported(config, capsys, "dpo")
    assert same["turns"] == ["turn_1", "turn_0"]
    assert (same["chosen"], same["rejected"]) == ([replied("Hello!")], [replied("No.")])
    assert redone["turns"] == ["turn_3", "turn_2"]
    assert redone["prompt"] == asked("Add 1 and 2.")["messages"]
    assert (redone["chosen"], redone["rejected"]) == ([replied("3")], [replied("4")])


def test_a_turn_is_in_one_pair_at_most(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Store(StoreConfig(dir=f"{config.parent}/state"))) as store:
        again = [turn(n, request=asked("Say hello."), reply=replied(str(n))) for n in range(7, 11)]
        add(store, *again)
        for number, score in zip(range(7, 11), (-1, -1, 1, 1), strict=True):
            judge(store, number, score)
    pairs = [row["turns"] for row in exported(config, capsys, "dpo")]
    names = [name for pair in pairs for name in pair]
    assert len(names) == len({*names})
    assert ["turn_9", "turn_8"] in pairs


def test_prompts_has_each_request_once(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [row["prompt"][-1]["content"] for row in exported(config, capsys, "prompts")]
    assert texts == ["Say hello.", "Add 1 and 2.", "No, add.", "Look.", "Who are you?"]


def test_traces_have_tokens_and_turns_have_everything(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces = exported(config, capsys, "traces")
    assert [trace["turns"][0]["node_id"] for trace in traces] == [f"turn_{n}" for n in range(6)]
    traced = traces[0]["turns"][0]
    assert traced["loss_mask"] == [0, 0, 0, 1, 1]
    assert traced["per_token_logps"] == [-0.1, -0.2]
    whole = exported(config, capsys, "turns")
    assert [row["verdict"]["score"] for row in whole] == [-1, 1, -1, 1, 1, -1]
    assert whole[4]["request"]["tools"] == [TOOL]


def test_only_turns_of_a_lineage_are_exported_on_wish(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(Store(StoreConfig(dir=f"{config.parent}/state"))) as store:
        add(store, turn(20, lineage="other", request=asked("Mine.")))
    (row,) = exported(config, capsys, "prompts", "--lineage", "other")
    assert row["prompt"][0]["content"] == "Mine."


@pytest.mark.parametrize("what", ["sft", "kto", "dpo", "prompts", "traces"])
def test_parquet_holds_the_same_rows(
    config: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    rows = exported(config, capsys, what)
    out = config.with_name(f"{what}.parquet")
    assert main(["export", what, "--out", str(out), "--config", str(config)]) == 0
    from datasets import load_dataset

    read = load_dataset("parquet", data_files=str(out), cache_dir=str(config.parent / "cache"))
    assert [_without_nulls(row) for row in read["train"]] == [_without_nulls(row) for row in rows]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("what", ["sft", "kto", "dpo"])
@pytest.mark.filterwarnings("default")
def test_trl_trains_a_step_on_an_export_as_it_is(config: Path, what: str, suffix: str) -> None:
    import trl  # these imports take seconds
    from datasets import load_dataset

    out = config.with_name(f"{what}.{suffix}")
    assert main(["export", what, "--out", str(out), "--config", str(config)]) == 0
    kind = "json" if suffix == "jsonl" else suffix
    data = load_dataset(kind, data_files=str(out), cache_dir=str(config.parent / "cache"))
    trainer, arguments = (getattr(trl, what.upper() + part) for part in ("Trainer", "Config"))
    options: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    options |= {"report_to": "none", "bf16": False, "save_strategy": "no", "max_length": 64}
    trained = trainer(
        model=str(POLICY),
        args=arguments(output_dir=str(config.parent / "trained"), **options),
        train_dataset=data["train"],
    )
    assert trained.train().global_step == 1


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.filterwarnings("default")
def test_trl_draws_and_trains_a_step_on_the_prompts_as_they_are(config: Path, suffix: str) -> None:
    from datasets import load_dataset
    from trl import GRPOConfig, GRPOTrainer  # importing them warns of this vLLM's version

    out = config.with_name(f"prompts.{suffix}")
    assert main(["export", "prompts", "--out", str(out), "--config", str(config)]) == 0
    kind = "json" if suffix == "jsonl" else suffix
    data = load_dataset(kind, data_files=str(out), cache_dir=str(config.parent / "cache"))
    arguments = GRPOConfig(
        output_dir=str(config.parent / "trained"),
        max_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    asked_for: list[Any] = []

    def by_order(prompts: list[Any], **_: Any) -> list[float]:
        asked_for.extend(prompts)
        return [float(number) for number in range(len(prompts))]

    trained = GRPOTrainer(
        model=str(POLICY), reward_funcs=by_order, args=arguments, train_dataset=data["train"]
    )
    assert trained.train().global_step == 1
    assert asked_for[0] == asked_for[1]  # a group
    assert asked_for[0][-1]["content"] in {row["prompt"][-1]["content"] for row in data["train"]}


def test_a_file_is_private_and_never_replaces_another(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(config, capsys, "kto")
    out = config.with_name("kto.jsonl")
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert main(["export", "sft", "--out", str(out), "--config", str(config)]) == 2
    assert "it is there already; name another" in capsys.readouterr().err
    assert [path.name for path in config.parent.glob(".kto*")] == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["kto", "--out", "x.csv"], "expected a name that ends in .jsonl or .parquet"),
        (["turns", "--out", "x.parquet"], "expected a name that ends in .jsonl"),
        (["sft", "--out", "nowhere/x.jsonl"], "there is no folder"),
        (["sft", "--out", "x.jsonl", "--merged"], "for `nextstate export adapter` only"),
        (
            ["sft", "--out", "x.jsonl", "--lineage", "nobody"],
            "'nobody' has no turn here; known: main",
        ),
        (["adapter", "--out", "x"], "--version is missing"),
        (["adapter", "--out", "x", "--version", "9"], "there is no version 9"),
        (["adapter", "--out", "x", "--version", "0"], "it is the base model itself"),
    ],
)
def test_what_cannot_be_exported_is_told(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    what, flag, out, *more = arguments
    path = str(config.parent / out)
    assert main(["export", what, flag, path, *more, "--config", str(config)]) == 2
    assert told in capsys.readouterr().err
    assert not Path(path).exists()


def test_an_adapter_is_exported_as_it_is_and_merged_into_a_whole_model(
    config: Path, tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(POLICY)
    tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    with closing(Store(StoreConfig(dir=f"{tmp_path}/state"))) as store:
        store.versions.add(
            PolicyVersion(
                "main", 1, 0, str(tmp_path / "adapter"), "0" * 64, 1, VersionState.SERVING
            ),
            None,
        )
    asked_for = ["--version", "1", "--config", str(config)]
    assert main(["export", "adapter", "--out", str(tmp_path / "a"), *asked_for]) == 0
    assert main(["export", "adapter", "--out", str(tmp_path / "m"), "--merged", *asked_for]) == 0
    ids = torch.tensor([[3, 4, 5]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, tuned(ids).logits)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@pytest.mark.parametrize("what", ["kto", "prompts"])
def test_an_export_of_nothing_says_why_and_leaves_no_file(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "nextstate.toml"
    config.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    out = tmp_path / f"{what}.jsonl"
    assert main(["export", what, "--out", str(out), "--config", str(config)]) == 2
    assert "turn fits; `nextstate status` says how many there are" in capsys.readouterr().err
    assert not out.exists()


def test_json_lines_that_datasets_may_not_read_say_so(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(Store(StoreConfig(dir=f"{config.parent}/state"))) as store:
        add(store, *(turn(n, request=asked(f"{n} " * 1_400_000)) for n in range(11, 14)))
    for suffix, is_told in ((".jsonl", True), (".parquet", False)):
        out = config.with_name(f"prompts{suffix}")
        assert main(["export", "prompts", "--out", str(out), "--config", str(config)]) == 0
        assert ("datasets.load_dataset takes" in capsys.readouterr().out) == is_told
