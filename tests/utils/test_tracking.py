"""A run writes its metrics to a file, and optional backends get the same metrics."""

import json
import logging
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from utils.errors import UserError
from utils.timer import Stopwatch
from utils.tracking import Tracker, peak_memory, progress, setup_logging
from utils.video.write import VideoWriter

ROOT = Path(__file__).parents[2]


class FakeRun:
    def __init__(self, options: dict):
        self.id = options["id"] or "fresh"
        self.options, self.logged, self.finished = options, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb_runs(monkeypatch) -> list[FakeRun]:
    """Replace wandb, which needs an account. Give the list of its runs with everything that they received."""
    runs = []

    def init(**options):
        runs.append(FakeRun(options))
        return runs[-1]

    fake = types.SimpleNamespace(init=init, Video=lambda path, format: ("video", path, format))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return runs


@pytest.fixture
def restore_logging():
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def read_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_a_line_that_is_on_disk_at_once(tmp_path):
    tracker = Tracker(tmp_path / "run", config={})
    tracker.log(1, {"loss": 0.5, "norm": torch.tensor(2.0)})
    assert read_lines(tmp_path / "run") == [{"step": 1, "loss": 0.5, "norm": 2.0}]
    tracker.log(2, {"loss": float("nan"), "norm": float("inf")})
    tracker.close()
    with Tracker(tmp_path / "run", config={}, step=2) as resumed:
        resumed.log(3, {"loss": 0.25})
    assert read_lines(tmp_path / "run")[1:] == [{"step": 2, "loss": None, "norm": None}, {"step": 3, "loss": 0.25}]


def test_a_resumed_run_drops_the_lines_that_will_come_again_and_a_torn_one(tmp_path):
    with Tracker(tmp_path, config={}) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with Tracker(tmp_path, config={}, step=2) as resumed:
        resumed.log(3, {"loss": 0.25})
    assert read_lines(tmp_path) == [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}, {"step": 3, "loss": 0.25}]
    Tracker(tmp_path, config={}).close()
    assert read_lines(tmp_path) == []


def test_a_full_disk_costs_a_line_and_a_warning_but_not_the_run(tmp_path, caplog):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Tracker(tmp_path, config={}) as tracker:
        tracker.log(1, {"loss": 1})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
        try:
            tracker.log(2, {"loss": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        tracker.log(3, {"loss": 3})
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 3]
    assert "metrics not written" in caplog.text


def test_a_stopwatch_books_each_moment_once():
    clock = Stopwatch(torch.device("cpu"))
    with clock.phase("outer"):
        time.sleep(0.02)
        with clock.phase("inner"):
            time.sleep(0.05)
    spent = clock.lap()
    assert spent.keys() == {"outer", "inner"}
    assert spent["inner"] >= 0.05 and 0.02 <= spent["outer"] < 0.05
    assert clock.lap() == {}


def test_memory_grows_with_what_is_held():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(int((before + 0.1) * 2**28))  # float32: more than all that was ever held
    assert peak_memory(torch.device("cpu")) >= before + 0.1 and held.sum() > 0


def test_other_processes_write_nothing(tmp_path, wandb_runs):
    with Tracker(tmp_path / "run", wandb=True, config={}, is_main=False) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.video("sample", tmp_path / "none.mp4", 1)
    assert not (tmp_path / "run").exists() and not wandb_runs


def test_wandb_gets_metrics_videos_and_the_same_run_after_a_resume(tmp_path, wandb_runs):
    with Tracker(tmp_path / "run", wandb=True, config={"lr": 1.0}) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.video("sample", tmp_path / "clip.mp4", 1)
    (run,) = wandb_runs
    assert run.options["config"] == {"lr": 1.0} and run.options["name"] == "run" and run.finished
    assert run.logged == [(1, {"loss": 0.5}), (1, {"sample": ("video", str(tmp_path / "clip.mp4"), "mp4")})]
    Tracker(tmp_path / "run", wandb=True, config={}).close()
    assert wandb_runs[1].options["id"] == "fresh" and wandb_runs[1].options["resume"] == "allow"


def test_tensorboard_gets_metrics_and_frames(tmp_path):
    pytest.importorskip("tensorboard")
    with VideoWriter(tmp_path / "clip.mp4", fps=8) as writer:
        writer.write(torch.zeros(3, 3, 16, 16))
    with Tracker(tmp_path / "run", tensorboard=True, config={}) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.video("sample", tmp_path / "clip.mp4", 1)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5)]
    assert [(e.step, e.width) for e in events.Images("sample")] == [(1, 3 * 16)]  # the frames side by side


@pytest.mark.parametrize("backend", ["wandb", "tensorboard"])
def test_a_backend_that_is_not_installed_names_its_extra(tmp_path, monkeypatch, backend):
    monkeypatch.setitem(sys.modules, backend, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match=rf"{backend} is not installed: pip install -e '\.\[{backend}\]'"):
        Tracker(tmp_path, config={}, **{backend: True})


def test_only_the_main_process_logs_information(capsys, restore_logging):
    setup_logging(is_main=True)
    logging.getLogger("some.module").info("from the first")
    setup_logging(is_main=False)
    logging.getLogger("some.module").info("from the second")
    logging.getLogger("some.module").error("trouble in the second")
    out, err = capsys.readouterr()
    assert out == ""
    assert "from the first" in err and "from the second" not in err and "trouble in the second" in err
    assert err.count("\n") == 2


def test_progress_is_shown_on_a_terminal_in_the_main_process_only(capsys, monkeypatch):
    assert list(progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress(range(3), is_main=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    with progress(5, "training", unit="step") as bar:
        bar.update(5)
    shown = capsys.readouterr().err
    assert "training" in shown and "5/5" in shown and "step/s" in shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_under_the_log_file_stops_nothing():
    code = "from utils.tracking import setup_logging; import logging; setup_logging(); logging.warning('no room')"
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", code + "; print('on')"], stderr=full, cwd=ROOT).returncode == 0
