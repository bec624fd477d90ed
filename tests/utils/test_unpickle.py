"""No pickle can run code, and none can take more memory than its file declares."""

import os
import tracemalloc
import zipfile

import pytest
import torch

from utils.errors import UserError
from utils.unpickle import load_torch


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_hold_tensors_only(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(3)}, tmp_path / "good.pt", _use_new_zipfile_serialization=zipped)
    assert load_torch(tmp_path / "good.pt")["a"].tolist() == [1, 1, 1]
    torch.save({"a": Attack()}, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="code"):
        load_torch(tmp_path / "bad.pt")
    assert not (tmp_path / "attacked").exists()


def test_a_pickle_that_unpacks_to_more_than_its_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 2**26)
    with pytest.raises(UserError, match="declares"):
        load_torch(tmp_path / "bomb.pt")


def rezipped(source, target, compress):
    """Write a copy of a torch file. The members that `compress` selects are compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            kind = zipfile.ZIP_DEFLATED if compress(member.filename) else zipfile.ZIP_STORED
            new.writestr(member.filename, old.read(member), compress_type=kind)


def test_compressed_tensors_are_refused_and_never_read_as_values(tmp_path):
    """Tensors are memory-mapped, but the bytes of a compressed tensor are not its values."""
    torch.save({"a": torch.arange(1000.0), "b": torch.rand(50_000)}, tmp_path / "good.pt")
    rezipped(tmp_path / "good.pt", tmp_path / "all.pt", lambda name: "/data/0" in name)
    with pytest.raises(UserError, match="data/0 is compressed"):
        load_torch(tmp_path / "all.pt")
    rezipped(tmp_path / "good.pt", tmp_path / "pickle.pt", lambda name: name.endswith(".pkl"))
    assert load_torch(tmp_path / "pickle.pt")["a"][-1] == 999


def test_a_pickle_whose_size_is_a_lie_costs_no_memory(tmp_path):
    """The archive declares 100 bytes, but unpacked it would have 64 MiB."""
    torch.save({"a": torch.ones(3)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "lie.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("lie/data.pkl", b"\x80\x02" + b"\0" * 2**26)
        archive.writestr("lie/version", b"3")
    data = bytearray((tmp_path / "lie.pt").read_bytes())
    size = (2**26 + 2).to_bytes(4, "little")
    while (at := data.find(size)) >= 0:
        data[at : at + 4] = (100).to_bytes(4, "little")
    (tmp_path / "lie.pt").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(UserError, match="damaged"):
        load_torch(tmp_path / "lie.pt")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
