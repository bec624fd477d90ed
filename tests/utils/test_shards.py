"""Shards: written items can be read again, a killed writer can continue, and half-written files do not count."""

import json
import time
from pathlib import Path

import pytest
import torch

from scripts.endurance.kills import start_ranks, wait
from utils.errors import UserError
from utils.shards import Shards, ShardWriter


def tensors(item: int) -> dict[str, torch.Tensor]:
    return {"states": torch.full((2, 3), float(item)), "clean": torch.arange(item, dtype=torch.float16)}


def write(folder: Path, items, shard_size: int = 3) -> None:
    with ShardWriter(folder, {"kind": "test"}, shard_size=shard_size) as writer:
        for item in items:
            writer.add(item, {"prompt": f"prompt {item} 🐈"}, tensors(item))


def read(folder: Path) -> Shards:
    return Shards(folder, key="ode.pairs", remedy="make them")


def test_items_come_back_in_the_order_of_their_numbers(tmp_path):
    write(tmp_path, [5, 2, 9, 7, 1])
    shards = read(tmp_path)
    assert len(shards) == 5 and shards.about == {"kind": "test"}
    assert [record["prompt"] for record in shards.records] == [f"prompt {item} 🐈" for item in (1, 2, 5, 7, 9)]
    for index, item in enumerate((1, 2, 5, 7, 9)):
        assert all(torch.equal(shards.read(index, name), value) for name, value in tensors(item).items())
    assert shards.read(0, "nothing") is None


def test_writing_goes_on_where_it_stopped_and_an_error_loses_nothing_that_was_added(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, {"kind": "test"}, shard_size=3) as writer:
        for item in range(5):
            writer.add(item, {"prompt": ""}, tensors(item))
        raise RuntimeError
    with ShardWriter(tmp_path, {"kind": "test"}) as writer:
        assert writer.remaining(range(8)) == [5, 6, 7]
        with pytest.raises(ValueError, match="item 4 is already"):
            writer.add(4, {}, tensors(4))
    write(tmp_path, [5, 6, 7])
    assert torch.equal(read(tmp_path).read(7, "clean"), tensors(7)["clean"])


def test_a_shard_without_its_records_does_not_count_and_is_written_again(tmp_path):
    write(tmp_path, range(6))
    (tmp_path / "shard_00000003.json").unlink()  # as if killed between the two files
    (tmp_path / "shard_00000003.safetensors").write_bytes(b"half")
    assert len(read(tmp_path)) == 3
    write(tmp_path, ShardWriter(tmp_path, {"kind": "test"}).remaining(range(6)))
    assert [float(read(tmp_path).read(item, "states")[0, 0]) for item in range(6)] == [0, 1, 2, 3, 4, 5]


def test_another_kind_of_content_is_refused(tmp_path):
    write(tmp_path, [0])
    with pytest.raises(UserError, match=r"was begun with kind='test', not 'other'; choose another folder"):
        ShardWriter(tmp_path, {"kind": "other"})


def test_an_empty_folder_and_a_damaged_file_are_named_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"ode\.pairs=.*holds no items; make them"):
        read(tmp_path)
    write(tmp_path, [0])
    (tmp_path / "shard_00000000.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"shard_00000000\.safetensors cannot be read .*then make them"):
        read(tmp_path).read(0, "states")
    (tmp_path / "shard_00000000.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*shard_00000000\.json"):
        read(tmp_path)


def write_400(folder: Path) -> None:
    """In a process of its own: write what is missing of 400 items."""
    with ShardWriter(folder, {}, shard_size=4) as writer:
        (folder / "ready").touch()
        for item in writer.remaining(range(400)):
            writer.add(item, {"item": item}, {"x": torch.full((1000,), item)})


def test_a_writer_killed_again_and_again_ends_with_every_item(tmp_path):
    for delay in (0.01, 0.04):
        (tmp_path / "ready").unlink(missing_ok=True)
        (process,) = start_ranks(write_400, (tmp_path,), 1)
        while not (tmp_path / "ready").exists():
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join()
    wait(start_ranks(write_400, (tmp_path,), 1), timeout=100)
    shards = read(tmp_path)
    assert [record["item"] for record in shards.records] == list(range(400))
    assert all(bool((shards.read(item, "x") == item).all()) for item in range(400))
    assert all(json.loads(path.read_text()) for path in tmp_path.glob("shard_*.json"))


MISFITS = {
    "shape": ({"latents": torch.zeros(2, 4)}, "latents has the shape [2, 4], not [2, 3]"),
    "dimensions": ({"latents": torch.zeros(3)}, "latents has the shape [3], not [2, 3]"),
    "type": ({"latents": torch.zeros(2, 3, dtype=torch.int64)}, "latents has the type torch.int64"),
    "not finite": ({"latents": torch.full((2, 3), torch.nan)}, "latents holds values that are not finite"),
    "missing": ({"other": torch.zeros(2, 3)}, "latents is missing"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_tensor_that_does_not_fit_is_one_line(tmp_path, name):
    stored, text = MISFITS[name]
    with ShardWriter(tmp_path, {}) as writer:
        writer.add(7, {}, stored)
    with pytest.raises(UserError) as caught:
        read(tmp_path).read(0, "latents", shape=(2, 3))
    assert text in str(caught.value) and "item 7" in str(caught.value) and str(caught.value).endswith("then make them")


@pytest.mark.parametrize("content", [b"", b"{", b'{"3": 4}', b'{"three": {}}', b"[]", b"\xff\xfe", b'{"-1": {}}'])
def test_a_damaged_listing_is_one_line_and_is_made_again(tmp_path, content, caplog):
    write(tmp_path, range(6))
    (tmp_path / "shard_00000003.json").write_bytes(content)
    with pytest.raises(UserError, match=r"shard_00000003\.json"):
        read(tmp_path)
    with caplog.at_level("WARNING"), ShardWriter(tmp_path, {"kind": "test"}) as writer:
        assert writer.remaining(range(6)) == [3, 4, 5]
    assert "shard_00000003.json.damaged" in caplog.text and len(caplog.records) == 1
    write(tmp_path, [3, 4, 5])
    assert len(read(tmp_path)) == 6


def test_items_without_prompts_are_one_line(tmp_path):
    write(tmp_path, range(2))
    (tmp_path / "shard_00000000.json").write_text('{"0": {"prompt": "a cat"}, "1": {"prompt": 5}}')
    with pytest.raises(UserError, match=r"the prompts: 1 = 5"):
        read(tmp_path).prompts()
