"""Whatever happens to the files of a checkpoint, a run goes on from the newest good one, with one warning."""

import json
import logging
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from utils.checkpoint import Checkpoints, KeepPolicy, load_checkpoint, read_tensors
from utils.checkpoint_files import (
    Checksum,
    DamagedCheckpoint,
    Manifest,
    read_manifest,
    read_state,
    stored_tensors,
    verify,
    write_manifest,
)
from utils.checkpoint_search import find_good_checkpoint, latest_checkpoint
from utils.errors import UserError

GOOD, NEWEST = "step_00000004", "step_00000006"
FILES = ("manifest.json", "state.json", "rank_00000.safetensors")


class Values:
    """An object without tensors."""

    def __init__(self) -> None:
        self.place = 3

    def state_dict(self) -> dict:
        return {"place": self.place}

    def load_state_dict(self, state: dict) -> None:
        self.place = state["place"]


def objects() -> dict:
    return {"net": nn.Linear(2, 3), "values": Values()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Give a folder with checkpoints of the steps 4 and 6."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", KeepPolicy(5))
    for step in (4, 6):
        checkpoints.save(step, objects(), {})
    return tmp_path / "checkpoints"


@pytest.fixture
def warnings(caplog) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING)

    def warnings() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return warnings


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def replaced(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def moved_behind_a_link(path: Path) -> None:
    aside = path.parents[2] / path.name
    path.rename(aside)
    path.symlink_to(aside)


DAMAGES = {
    "missing": Path.unlink,
    "empty": lambda path: replaced(path, b""),
    "truncated": lambda path: replaced(path, path.read_bytes()[: path.stat().st_size // 2]),
    "a byte short": lambda path: replaced(path, path.read_bytes()[:-1]),
    "a byte long": lambda path: replaced(path, path.read_bytes() + b"\n"),
    "zeros": lambda path: replaced(path, bytes(path.stat().st_size)),
    "garbage": lambda path: replaced(path, bytes(range(256)) * 3),
    "of the other checkpoint": lambda path: replaced(path, (path.parents[1] / GOOD / path.name).read_bytes()),
    "a folder": made_a_folder,
    "a link": moved_behind_a_link,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_makes_the_run_fall_back_with_one_warning(folder, warnings, file, damage):
    DAMAGES[damage](folder / NEWEST / file)
    before = content(folder / NEWEST)
    assert find_good_checkpoint(folder) == folder / GOOD
    (warning,) = warnings()
    assert NEWEST in warning and GOOD in warning and f"{NEWEST}.damaged" in warning and "\n" not in warning
    assert content(folder / f"{NEWEST}.damaged") == before and not (folder / NEWEST).exists()
    assert find_good_checkpoint(folder) == folder / GOOD and warnings() == []
    load_checkpoint(folder / GOOD, objects())


@pytest.mark.parametrize("left", [[], ["state.json"], ["rank_00000.safetensors"]], ids=str)
def test_a_folder_that_lost_its_files_is_no_checkpoint(folder, warnings, left):
    for name in set(FILES) - set(left):
        (folder / NEWEST / name).unlink()
    assert find_good_checkpoint(folder) == folder / GOOD
    (warning,) = warnings()
    assert NEWEST in warning and GOOD in warning


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff\x00 garbage\n\n")


LATEST = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_text(""),
    "garbage": garbage,
    "a name that is not there": lambda path: path.write_text("step_00000099\n"),
    "no name of a checkpoint": lambda path: path.write_text("newest\n"),
    "a path outside": lambda path: path.write_text("../elsewhere/step_00000006\n"),
    "a folder": made_a_folder,
    "long": lambda path: path.write_text("step_00000006" * 10_000),
}


@pytest.mark.parametrize("damage", LATEST)
def test_a_damaged_latest_leads_to_the_newest_good_checkpoint(folder, warnings, damage):
    shutil.copytree(folder, folder.with_name("elsewhere"))
    LATEST[damage](folder / "latest")
    assert find_good_checkpoint(folder) == folder / NEWEST
    messages = warnings()
    assert "latest" in messages[-1] and NEWEST in " ".join(messages) and len(messages) <= 1 + (damage == "a folder")
    assert (folder / "latest").read_text() == NEWEST + "\n"
    assert find_good_checkpoint(folder) == folder / NEWEST and warnings() == []


def test_an_older_checkpoint_that_latest_names_is_taken_without_a_word(folder, warnings):
    (folder / "latest").write_text(f"{GOOD}\n")
    assert find_good_checkpoint(folder) == folder / GOOD and warnings() == []
    assert latest_checkpoint(folder) == folder / GOOD and (folder / NEWEST).is_dir()


def test_every_single_flipped_bit_is_found(folder):
    """This test flips at least one bit of every byte. `scripts/endure.py damage` flips all of them."""
    checkpoint = folder / NEWEST
    flips = missed = 0
    for file in FILES:
        data = (checkpoint / file).read_bytes()
        for place in range(0, 8 * len(data), 5 if file == "manifest.json" else 9):
            flipped = bytearray(data)
            flipped[place // 8] ^= 1 << place % 8
            (checkpoint / file).write_bytes(flipped)
            flips += 1
            try:
                manifest = read_manifest(checkpoint)
                verify(checkpoint, manifest)
                missed += manifest.step == 6
            except DamagedCheckpoint:
                continue
        (checkpoint / file).write_bytes(data)
    assert flips > 600 and missed == 0
    assert find_good_checkpoint(folder) == checkpoint


def test_without_a_good_checkpoint_nothing_starts_anew_and_nothing_is_touched(folder):
    for name in (GOOD, NEWEST):
        (folder / name / "state.json").write_text("{}")
    before = content(folder)
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            find_good_checkpoint(folder)
        message = str(caught.value)
        assert "\n" not in message and NEWEST in message and "--no_resume" in message
    assert content(folder) == before


def test_latest_without_any_checkpoint_is_a_mistake_but_an_empty_folder_is_a_start(folder, tmp_path):
    for name in (GOOD, NEWEST):
        shutil.rmtree(folder / name)
    with pytest.raises(UserError, match="names 'step_00000006', but there is no checkpoint"):
        find_good_checkpoint(folder)
    assert find_good_checkpoint(tmp_path / "nowhere") is None


FOREIGN = ("step_00000004-backup", "step_00000006.good", "step_4", "step_000000007", "step_00000003 (copy)", "notes")


def test_what_the_run_did_not_make_is_neither_counted_nor_deleted(folder, tmp_path):
    for name in FOREIGN:
        shutil.copytree(folder / GOOD, folder / name)
    shutil.copytree(folder / GOOD, folder / "step_00000001")  # its manifest is that of step 4
    (folder / "step_00000002").mkdir()
    (folder / "step_00000002" / "mine.txt").write_text("mine")
    shutil.copytree(folder / GOOD, tmp_path / "elsewhere")
    (folder / "step_00000003").symlink_to(tmp_path / "elsewhere")
    before = {name: content(folder / name) for name in (*FOREIGN, "step_00000001", "step_00000002")}
    checkpoints = Checkpoints(folder, KeepPolicy(1))
    for step in (8, 10):
        checkpoints.save(step, objects(), {})
    assert {name: content(folder / name) for name in before} == before
    assert (folder / "step_00000003").is_symlink() and content(tmp_path / "elsewhere")
    assert sorted(each.name for each in folder.iterdir()) == sorted(
        {*before, "step_00000003", "latest", "step_00000010"}
    )
    assert find_good_checkpoint(folder) == folder / "step_00000010"


def test_what_stands_in_the_way_of_a_checkpoint_is_set_aside(folder, warnings):
    (folder / "step_00000008").mkdir()
    (folder / "step_00000008" / "mine.txt").write_text("mine")
    Checkpoints(folder, KeepPolicy(5)).save(8, objects(), {})
    assert (folder / "step_00000008.damaged" / "mine.txt").read_text() == "mine" and len(warnings()) == 1
    assert find_good_checkpoint(folder) == folder / "step_00000008"


def test_a_pickle_in_a_checkpoint_is_never_run(folder, tmp_path):
    ran = tmp_path / "ran"

    class Program:
        def __reduce__(self) -> tuple:
            return (os.system, (f"touch {ran}",))

    program = pickle.dumps(Program())
    (folder / NEWEST / ".metadata").write_bytes(program)
    (folder / NEWEST / "__0_0.distcp").write_bytes(program)
    load_checkpoint(find_good_checkpoint(folder), objects())
    for file in FILES:
        (folder / NEWEST / file).write_bytes(program)
    assert find_good_checkpoint(folder) == folder / GOOD
    assert not ran.exists()


def forged(checkpoint: Path, rows: dict | None = None, state: object = None) -> None:
    """Change a checkpoint and compute its checksums again, as an attacker would."""
    file = checkpoint / "rank_00000.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["rows"] = json.dumps(json.loads(header["__metadata__"]["rows"]) | (rows or {}))
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    if state is not None:
        (checkpoint / "state.json").write_text(json.dumps(state))
    files = {name: (checkpoint / name).read_bytes() for name in FILES[1:]}
    sums = {name: Checksum(len(each), zlib.crc32(each)) for name, each in files.items()}
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, Manifest(6, sums))


LIES = [
    {"net/weight": [0, 2**40, 2]},
    {"net/weight": [0, 3, 2**40]},
    {"net/weight": [-3, 3, 2]},
    {"net/weight": [0]},
    {"net/weight": "all"},
    {"net/weight": [0, 3.5e300, 2]},
    {"net/weight": [0, None, 2]},
]


@pytest.mark.parametrize("rows", LIES, ids=str)
def test_a_header_that_lies_costs_no_memory_and_is_no_good_checkpoint(folder, rows):
    forged(folder / NEWEST, rows)
    verify(folder / NEWEST, read_manifest(folder / NEWEST))
    with pytest.raises(DamagedCheckpoint):
        stored_tensors(folder / NEWEST, read_manifest(folder / NEWEST))
    assert find_good_checkpoint(folder) == folder / GOOD


@pytest.mark.parametrize(
    "state", [[], {}, {"step": 6}, {"step": "6", "values": {}}, {"step": 4, "values": {}}], ids=str
)
def test_a_state_that_is_something_else_is_no_good_checkpoint(folder, state):
    forged(folder / NEWEST, state=state)
    assert find_good_checkpoint(folder) == folder / GOOD


@pytest.mark.parametrize("values", [{}, {"values": {}}, {"values": {"place": 1, "more": 2}, "net": {"x": 1}}], ids=str)
def test_values_that_do_not_fit_are_one_line(folder, values):
    forged(folder / NEWEST, state={"step": 6, "values": values})
    assert read_state(folder / NEWEST)["values"] == values
    try:
        load_checkpoint(folder / NEWEST, objects())
    except UserError as error:
        assert "does not fit this run" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 3), (5, 0), (7, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool], ids=str)
def test_every_shape_and_dtype_comes_back(tmp_path, shape, dtype):
    class One:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def state_dict(self) -> dict:
            return {"tensor": self.tensor, "tied": self.tensor}

        def load_state_dict(self, state: dict) -> None:
            self.tensor = state["tensor"]

    tensor = (torch.rand(shape) * 3).to(dtype)
    Checkpoints(tmp_path, KeepPolicy(1)).save(1, {"one": One(tensor)}, {})
    again = One(torch.zeros_like(tensor))
    load_checkpoint(find_good_checkpoint(tmp_path), {"one": again})
    assert torch.equal(again.tensor, tensor) and again.tensor.dtype == dtype
    assert torch.equal(read_tensors(latest_checkpoint(tmp_path))["one/tied"], tensor)
