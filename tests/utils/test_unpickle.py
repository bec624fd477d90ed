"""No pickle can run code, and none can take more memory than its file declares."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from utils.errors import UserError
from utils.unpickle import load_torch, restricted_load


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_only_allowed_names_are_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    allowed = {("collections", "OrderedDict"): OrderedDict}
    assert restricted_load(io.BytesIO(pickle.dumps(OrderedDict(a=1))), allowed, "file") == {"a": 1}
    for hostile in (pickle.dumps(Attack()), pickle.dumps(print), pickle.dumps(OrderedDict(a=1))[:-5], b"garbage"):
        with pytest.raises(UserError):
            restricted_load(io.BytesIO(hostile), allowed, "file")
    assert not (tmp_path / "attacked").exists()


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
