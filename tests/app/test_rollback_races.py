"""A rollback during training, with real training steps, stays in service."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from learner import stage
from learner.trainer import PolicyTrainer
from nextstate.engine import client
from nextstate.engine.client import publish_candidate
from nextstate.errors import EngineError
from nextstate.records import Decisions, PolicyVersion
from nextstate.store.versions import Versions
from tests.engine.test_publishing import Engine, states
from tests.learner.test_tiny_model import CONFIG, GOOD, Recorded, save_tiny_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


class Loop:
    """A learner whose publisher is the real one, on an engine that is not."""

    def __init__(self, folder: Path, model_path: str, wanted: int) -> None:
        self.recorded = Recorded(folder, model_path)
        self.store = self.recorded.store
        self.stop = threading.Event()
        self.engine = Engine()
        self._model_path = model_path
        self._wanted = wanted

    def publish(self, version: PolicyVersion, withdraw: Decisions | None = None) -> None:
        assert withdraw is None
        asyncio.run(publish_candidate(self.store, [self.engine.client], version))
        if version.number >= self._wanted:
            self.stop.set()

    def run(self, publish: Callable[..., None] | None = None) -> None:
        stage.run(
            self.store, CONFIG, self._model_path, ["main"], publish or self.publish, self.stop
        )

    def restart(self, wanted: int) -> None:
        self.stop.clear()
        self._wanted = wanted
        self.run()


def test_a_rollback_during_an_update_stays_and_training_goes_on_from_it(
    tmp_path: Path, model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path / "state", model_path, wanted=4)
    loop.recorded.add_mixed(16 * 4)
    update, updates = PolicyTrainer.update, []

    def roll_back_then_update(self: PolicyTrainer, *arguments: object) -> object:
        updates.append(self)
        if len(updates) == 3:
            loop.store.versions.set_serving("main", 1)
        return update(self, *arguments)

    monkeypatch.setattr(PolicyTrainer, "update", roll_back_then_update)
    loop.run()
    assert [(v.number, v.parent, v.state.value) for v in loop.store.versions.all("main")] == [
        (1, 0, "retired"), (2, 1, "retired"), (3, 2, "retired"), (4, 1, "serving"),
    ]  # fmt: skip
    third = loop.store.versions.all("main")[2]
    assert "version 1 was put into service" in (third.reason or "")
    assert third.adapter_name not in loop.engine.probed  # nothing was loaded for it
    assert loop.recorded.states() == {"trained": 64}


def test_a_choice_of_what_serves_already_stays_too(
    tmp_path: Path, model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person tries version 0 during an update and goes back to version 1, which they want."""
    loop = Loop(tmp_path / "state", model_path, wanted=3)
    loop.recorded.add_mixed(16 * 3)
    update, updates = PolicyTrainer.update, []

    def choose_then_update(self: PolicyTrainer, *arguments: object) -> object:
        updates.append(self)
        if len(updates) == 2:
            loop.store.versions.set_serving("main", 0)
            loop.store.versions.set_serving("main", 1)
        return update(self, *arguments)

    monkeypatch.setattr(PolicyTrainer, "update", choose_then_update)
    loop.run()
    assert [(v.number, v.parent, v.state.value) for v in loop.store.versions.all("main")] == [
        (1, 0, "retired"), (2, 1, "retired"), (3, 1, "serving"),
    ]  # fmt: skip
    second = loop.store.versions.all("main")[1]
    assert "version 1 was put into service" in (second.reason or "")
    assert second.adapter_name not in loop.engine.probed


def test_a_learner_that_starts_again_publishes_nothing_over_a_rollback(
    tmp_path: Path, model_path: str
) -> None:
    loop = Loop(tmp_path / "state", model_path, wanted=2)
    loop.recorded.add_mixed(16 * 3)
    loop.run()

    def down(version: PolicyVersion, withdraw: Decisions | None = None) -> None:
        loop.stop.set()
        raise EngineError("it restarts")

    loop.stop.clear()
    loop.run(down)
    assert states(loop.store) == [(1, "retired"), (2, "serving"), (3, "candidate")]
    loop.store.versions.set_serving("main", 1)
    loop.recorded.add_mixed(16)
    loop.restart(wanted=4)
    assert [(v.number, v.parent, v.state.value) for v in loop.store.versions.all("main")] == [
        (1, 0, "retired"), (2, 1, "retired"), (3, 2, "retired"), (4, 1, "serving"),
    ]  # fmt: skip


def test_a_version_whose_batch_was_not_settled_yet_serves_only_if_nobody_chose_another(
    tmp_path: Path, model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path / "state", model_path, wanted=2)
    loop.recorded.add_mixed(16 * 3)
    loop.run()

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    loop.stop.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Versions, "add", die)
        with pytest.raises(Killed):
            loop.run()
    loop.store.versions.set_serving("main", 1)
    loop.recorded.add_mixed(16)
    loop.restart(wanted=4)
    assert [(v.number, v.parent, v.state.value) for v in loop.store.versions.all("main")] == [
        (1, 0, "retired"), (2, 1, "retired"), (3, 2, "retired"), (4, 1, "serving"),
    ]  # fmt: skip
    assert loop.recorded.states() == {"trained": 64}


def test_a_version_that_a_person_keeps_while_the_engine_is_down_is_not_withdrawn(
    tmp_path: Path, model_path: str
) -> None:
    """The watch has found a fall; before the engine can be asked, they choose the version again."""
    loop = Loop(tmp_path / "state", model_path, wanted=2)
    loop.recorded.add_mixed(16 * 2)
    loop.run()
    for version in range(3):
        for _ in range(60):
            score = -1 if version == 2 else 1
            loop.recorded.add(GOOD, score, version=version, trainable=False)
    tried: list[PolicyVersion] = []

    def publish(version: PolicyVersion, withdraw: Decisions | None = None) -> None:
        tried.append(version)
        if len(tried) == 1:
            loop.store.versions.set_serving("main", 2)
            raise EngineError("it restarts")
        assert withdraw is not None
        asyncio.run(client.withdraw(loop.store, [loop.engine.client], version, withdraw))
        loop.stop.set()

    loop.stop.clear()
    loop.run(publish)
    assert [v.number for v in tried] == [2, 2]
    assert states(loop.store) == [(1, "retired"), (2, "serving")]
