"""`nextstate judge train` and `eval` on a real vLLM: the new judge is loaded and votes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from demo.course import MODEL, POLICY
from nextstate.app.cli import main
from nextstate.app.settings import Settings
from nextstate.app.trained_judge import KAPPA, judge_versions
from nextstate.engine.client import EngineClient
from tests.app.test_judge_training import toy_cases
from tests.running_loop import Engine

pytestmark = pytest.mark.engine


def test_a_trained_judge_is_loaded_and_votes_also_after_the_engine_has_lost_it(
    native_engine: Engine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEST_ENGINE_KEY", native_engine.key)
    file, cases = tmp_path / "nextstate.toml", tmp_path / "cases.jsonl"
    file.write_text(
        f'[store]\ndir = "{tmp_path}/state"\n[engine]\nmode = "external"\n'
        f'url = "{native_engine.url}"\nmodel = "{POLICY}"\nserved_model_name = "{MODEL}"\n'
        'api_key_env = "TEST_ENGINE_KEY"\n'
        "[learner]\nthreads = 1\ngradient_checkpointing = false\n"
    )
    cases.write_text("\n".join(map(json.dumps, toy_cases(60))))
    evaluate = ["judge", "eval", str(cases), "--config", str(file)]

    assert main(evaluate) == 0
    assert "votes of engine\n" in capsys.readouterr().out

    more = ["--examples", "60", "--epochs", "8", "--config", str(file)]
    assert main(["judge", "train", str(cases), *more]) == 0
    (version,) = judge_versions(Settings.read(file))
    assert version.metrics[KAPPA] > 0.6

    async def unload() -> None:
        async with EngineClient(native_engine.url, MODEL, native_engine.key) as engine:
            assert version.adapter_name is not None
            assert await engine.has_model(version.adapter_name)
            await engine.unload_adapter(version.adapter_name)

    for _ in range(2):
        capsys.readouterr()
        assert main(evaluate) == 0
        printed = capsys.readouterr().out
        assert "votes of engine v1\n" in printed
        assert "of which 2.0 were written" in printed
        row = next(line for line in printed.splitlines() if line.startswith("all")).split()
        assert float(row[3]) > 0.6  # κ over vLLM, of what was trained on and what was held out
        asyncio.run(unload())
