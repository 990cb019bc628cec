"""plugins/environments/gui_tasks.py: tasks are held out by seed, words and a whole page."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextstate.episodes import Split
from plugins.environments import gui_tasks
from plugins.environments.generated import print_tasks
from plugins.environments.gui import create
from plugins.environments.gui_tasks import PAGES, UNSEEN, pages, task
from rollout.tasks import read_tasks


def test_a_task_depends_on_its_page_split_and_number_alone() -> None:
    for page in PAGES:
        assert task(page, "train", 3) == task(page, "train", 3)
        assert task(page, "train", 3)["seed"] != task(page, "train", 4)["seed"]


def test_no_seed_words_or_unseen_page_of_a_held_out_task_is_in_training() -> None:
    train, held_out = [
        [task(page, split, number) for page in pages(split) for number in range(100)]
        for split in ("train", "eval")
    ]
    assert max(one["seed"] for one in train) < min(one["seed"] for one in held_out)
    assert {one["words"] for one in train} == {"train"}
    assert {one["words"] for one in held_out} == {"eval"}
    assert {one["page"] for one in held_out} - {one["page"] for one in train} == {UNSEEN}
    assert len({one["page"] for one in train}) >= 6


def test_the_printed_tasks_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_tasks(gui_tasks.numbered, 48)
    file = tmp_path / "tasks.jsonl"
    file.write_text(capsys.readouterr().out)
    found = read_tasks(file, "gui", create(None).check_task)
    splits = [one.split for one in found]
    assert (splits.count(Split.TRAIN), splits.count(Split.EVAL)) == (48, 12)
    assert {one.fields["page"] for one in found if one.split is Split.EVAL} == {*PAGES}
