"""scripts/endure.py: its parts exist, its table shows the figures, and its exit code shows an exceeded limit."""

import importlib
import sys
from types import ModuleType

import pytest

from scripts import endure
from scripts.endurance.figures import Figure


@pytest.mark.parametrize("part", endure.PARTS)
def test_every_part_is_a_module_that_runs_in_a_folder(part):
    assert callable(importlib.import_module(f"scripts.endurance.{part}").run)


@pytest.mark.parametrize("is_kept", [True, False])
def test_the_table_has_a_line_for_every_figure(monkeypatch, capsys, is_kept):
    part = ModuleType("scripts.endurance.fake")
    part.run = lambda folder: [Figure("threads left", 3, "at most 2", is_kept)] if folder.is_dir() else []
    monkeypatch.setitem(sys.modules, part.__name__, part)
    monkeypatch.setattr(endure, "PARTS", {"fake": "threads are counted"})
    assert endure.main(["fake"]) == (0 if is_kept else 1)
    lines = capsys.readouterr().out.splitlines()
    assert f"| fake | threads left | 3 | at most 2 | {'ok' if is_kept else 'BROKEN'} |" in lines
    assert lines[-1].startswith("| fake | minutes | 0 |")


def test_another_part_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        endure.main(["kill"])
    assert "'kill' is not a part; choose from kills, damage" in capsys.readouterr().err
