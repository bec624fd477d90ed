"""Checkpoints: saved values can be loaded again, and an error during a save never costs a good checkpoint."""

import json
import logging
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from utils.checkpoint import Checkpoints, KeepPolicy, load_checkpoint, read_about, read_tensors
from utils.checkpoint_search import latest_checkpoint, put_away
from utils.errors import UserError


class Counter:
    """An object with a value, and with tensors that are created one by one."""

    def __init__(self, count: int = 0) -> None:
        self.tensors = {f"number {index}": torch.full((2,), index) for index in range(count)}
        self.place = count

    def state_dict(self) -> dict:
        return {"place": self.place, **self.tensors}

    def room_for(self, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: torch.empty_like(described, device="cpu") for key, described in saved.items()}

    def load_state_dict(self, state: dict) -> None:
        self.place = state.pop("place")
        self.tensors = state


@pytest.fixture
def objects() -> dict:
    return {"net": nn.Linear(64, 64), "counter": Counter(3)}


def store(folder: Path, objects: dict, steps: list[int], *, last: int = 2, every: int = 0, **options) -> Checkpoints:
    checkpoints = Checkpoints(folder, KeepPolicy(last, every), **options)
    for step in steps:
        checkpoints.save(step, objects, {"note": f"after {step}"})
    checkpoints.finish()
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file grow beyond `room` bytes. For a writer this is the same as a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make `folder` read-only, even for root."""
    mount = ["mount", "--bind", str(folder), str(folder)]
    if os.getuid() == 0:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("root cannot mount here, and writes to any folder")
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
    else:
        folder.chmod(0o500)
    try:
        yield
    finally:
        if os.getuid() == 0:
            subprocess.run(["umount", str(folder)], check=True)
        else:
            folder.chmod(0o700)


@pytest.mark.parametrize("background", [False, True])
def test_what_was_saved_comes_back(tmp_path, objects, background):
    store(tmp_path, objects, [7], background=background)
    fresh = {"net": nn.Linear(64, 64), "counter": Counter()}
    about = load_checkpoint(latest_checkpoint(tmp_path), fresh)
    assert about["step"] == 7 and about["note"] == "after 7" and about["versions"]["torch"] == torch.__version__
    assert all(torch.equal(value, objects["net"].state_dict()[key]) for key, value in fresh["net"].state_dict().items())
    assert fresh["counter"].place == 3 and fresh["counter"].tensors.keys() == objects["counter"].tensors.keys()
    assert torch.equal(fresh["counter"].tensors["number 2"], torch.tensor([2, 2]))


def test_a_checkpoint_in_the_background_holds_what_was_when_it_was_asked_for(tmp_path, objects):
    before = objects["net"].weight.detach().clone()
    checkpoints = Checkpoints(tmp_path, KeepPolicy(1), background=True)
    checkpoints.save(1, objects, {})
    with torch.no_grad():
        objects["net"].weight.zero_()
    checkpoints.finish()
    assert torch.equal(read_tensors(latest_checkpoint(tmp_path))["net/weight"], before)


def test_the_newest_stay_and_those_of_every_nth_step(tmp_path, objects):
    store(tmp_path, objects, [1, 2, 3, 4, 5, 6], last=2, every=3)
    assert names(tmp_path) == ["latest", "step_00000003", "step_00000005", "step_00000006"]
    assert latest_checkpoint(tmp_path).name == "step_00000006"


def test_the_latest_is_the_one_named_or_else_the_newest_whole_one(tmp_path, objects):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    store(tmp_path, objects, [1, 2, 3], last=3)
    (tmp_path / "latest").write_text("step_00000002\n")
    assert latest_checkpoint(tmp_path).name == "step_00000002"
    (tmp_path / "latest").unlink()
    assert latest_checkpoint(tmp_path).name == "step_00000003"
    (tmp_path / "step_00000003" / "manifest.json").unlink()
    assert latest_checkpoint(tmp_path).name == "step_00000002"


def test_what_a_killed_save_leaves_is_no_checkpoint_and_goes_with_the_next(tmp_path, objects):
    store(tmp_path, objects, [1])
    left = tmp_path / ".step_00000002.unfinished"
    left.mkdir()
    (left / "rank_00000.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path).name == "step_00000001"
    store(tmp_path, objects, [2])
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002"]


def test_a_save_killed_before_latest_moved_is_made_again(tmp_path, objects):
    store(tmp_path, objects, [1, 2])
    (tmp_path / "latest").write_text("step_00000001\n")
    store(tmp_path, objects, [2])
    assert latest_checkpoint(tmp_path).name == "step_00000002" and names(tmp_path)[1:] == names(tmp_path)[-2:]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("room", [0, 500, 5000], ids=["no room at all", "room for the state", "room for a part"])
def test_a_full_disk_costs_one_checkpoint_only(tmp_path, objects, caplog, background, room):
    checkpoints = store(tmp_path, objects, [1], background=background)
    good = read_tensors(latest_checkpoint(tmp_path))
    with full_disk(room):
        checkpoints.save(2, objects, {})
        checkpoints.finish()
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "checkpoint of step 2 could not be written" in warning and "File too large" in warning
    assert "training goes on, and step_00000001 is still good" in warning and "\n" not in warning
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert all(torch.equal(value, good[key]) for key, value in read_tensors(latest_checkpoint(tmp_path)).items())
    checkpoints.save(3, objects, {})
    checkpoints.finish()
    assert latest_checkpoint(tmp_path).name == "step_00000003"


def test_a_folder_that_cannot_be_written_to_costs_one_checkpoint_only(tmp_path, objects, caplog):
    checkpoints = store(tmp_path, objects, [1])
    with read_only(tmp_path):
        checkpoints.save(2, objects, {})
    assert "checkpoint of step 2 could not be written" in caplog.text
    assert "Read-only file system" in caplog.text or "Permission denied" in caplog.text
    checkpoints.save(3, objects, {})
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000003"]


def test_a_checkpoint_of_another_model_is_refused_by_name_and_shape(tmp_path, objects):
    store(tmp_path, objects, [1])
    with pytest.raises(UserError, match=r"net/bias \(checkpoint: \(64,\), run: \(32,\)\)"):
        load_checkpoint(latest_checkpoint(tmp_path), {**objects, "net": nn.Linear(64, 32)})
    with pytest.raises(UserError, match=r"net/bias \(checkpoint: \(64,\), run: missing\)"):
        load_checkpoint(latest_checkpoint(tmp_path), {"counter": Counter()})
    with pytest.raises(UserError, match=r"other/bias \(checkpoint: missing, run: \(2,\)\)"):
        load_checkpoint(latest_checkpoint(tmp_path), {**objects, "other": nn.Linear(2, 2)})


@pytest.mark.parametrize("damage", ["state.json", "manifest.json", "rank_00000.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, objects, damage):
    store(tmp_path, objects, [1])
    folder = latest_checkpoint(tmp_path)
    (folder / damage).write_bytes((folder / damage).read_bytes()[:100])
    with pytest.raises(UserError, match=r"step_00000001.*cannot be read.*older checkpoint"):
        load_checkpoint(folder, objects)


def test_everything_but_tensors_can_be_read_without_torch(tmp_path, objects):
    store(tmp_path, objects, [1])
    state = json.loads((latest_checkpoint(tmp_path) / "state.json").read_text())
    assert state == read_about(latest_checkpoint(tmp_path)) and state["values"] == {"counter": {"place": 3}}


def test_setting_aside_loses_nothing(tmp_path, objects):
    for _ in range(2):
        store(tmp_path / "checkpoints", objects, [1])
        put_away(tmp_path / "checkpoints")
    assert names(tmp_path) == ["checkpoints.old1", "checkpoints.old2"]
    assert latest_checkpoint(tmp_path / "checkpoints") is None
