"""Real gloo processes: sharded training equals that of one process, continues after kills, and ends together."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from scripts.endurance.kills import compare, kill_often, launch, log_file, repeated_metrics, step_reached, wait
from tests.distributed import unlucky
from tests.made_once import made_once
from utils.checkpoint import read_about
from utils.checkpoint_search import latest_checkpoint
from utils.errors import UserError

pytest_plugins = ["tests.shapes_parts"]

REPOSITORY = Path(__file__).resolve().parents[2]
GENTLE = ("optimizer.lr=1.0e-4", "critic_optimizer.lr=1.0e-4")
DMD = ("dmd.replay_rollouts=2", "dmd.critic_head_start=1", "student.gradient_checkpointing=true", *GENTLE)
OBJECTIVES = {
    "gan": ("objective=self_forcing_gan", "gan.heads.depths=[1.0]", "gan.r1_weight=0.1", *DMD),
    "diffusion": (
        "objective=diffusion",
        "optimizer.kind=muon",
        "text_encoder.weights=null",
        "diffusion.train_text_encoder=true",
        *GENTLE,
    ),
}
FOUR = ("trainer.total_batch_size=4",)
SAVING = "trainer.save_every=2"
SHARED = {
    "whole": (1, ("trainer.batch_size=4", "trainer.steps=4", *DMD)),
    "halves": (2, ("trainer.batch_size=2", "trainer.steps=4", SAVING, "trainer.save_in_background=true", *DMD)),
    "alone": (1, ("trainer.batch_size=1", "trainer.steps=6", SAVING, "trainer.save_in_background=false", *DMD)),
    "whole_of_two": (1, ("trainer.batch_size=2", "trainer.steps=2", *DMD)),
}
"""Trainings with DMD that several tests compare with: name -> (number of processes, settings)."""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def train(release, tmp_path):
    """Give a function that trains in several processes and returns the folder."""

    def train(name: str, processes: int, *overrides: str) -> Path:
        wait(launch(flags(release, tmp_path / name, *overrides), processes), timeout=240)
        return tmp_path / name

    return train


@pytest.fixture(scope="session")
def trained(release, tmp_path_factory):
    """Give a function that returns the folder of a training of SHARED. It trains once for all tests."""

    def trained(name: str) -> Path:
        processes, options = SHARED[name]

        def make(folder: Path) -> None:
            wait(launch(flags(release, folder / "run", *options), processes), timeout=240)

        return made_once(tmp_path_factory, f"trained_{name}", make) / "run"

    return trained


def flags(release, logdir: Path, *overrides: str) -> list[str]:
    return ["--config_path", release.config_path, "--no_visualize", "--logdir", str(logdir), *overrides]


def largest_difference(first: Path, second: Path) -> float:
    states = [torch.load(run / "model.pt", weights_only=True) for run in (first, second)]
    assert states[0].keys() == states[1].keys()
    return max(
        (tensor.float() - states[1][name][key].float()).abs().max().item()
        for name in states[0].keys() - {"step", "config"}
        for key, tensor in states[0][name].items()
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sharded_training_equals_that_of_one_process(train, objective):
    options = (*OBJECTIVES[objective], "trainer.steps=2")
    whole = train("whole", 1, "trainer.batch_size=4", *options)
    both = train("both", 2, "trainer.batch_size=1", *FOUR, *options)
    assert largest_difference(whole, both) <= 1e-5
    state = torch.load(whole / "model.pt", weights_only=True)
    moved = [(state["generator"][key] - average).abs().max() for key, average in state["generator_ema"].items()]
    assert max(moved) > 5e-5  # so the equality says something


def test_however_a_batch_is_divided_the_updates_are_the_same(train, trained):
    passes = train("passes", 1, "trainer.batch_size=1", "trainer.steps=4", *FOUR, *DMD)
    for other in (passes, trained("halves")):
        assert largest_difference(trained("whole"), other) <= 1e-5


def test_other_ways_to_shard_give_the_same_updates(train, trained):
    options = ("parallel.shard_size=1", "parallel.offload_teacher=true", "parallel.offload_trained=true")
    hybrid_and_offloaded = train("other", 2, "trainer.batch_size=1", "trainer.steps=2", *DMD, *options)
    assert largest_difference(trained("whole_of_two"), hybrid_and_offloaded) <= 1e-5


@pytest.mark.parametrize(("name", "processes"), [("whole", 2), ("halves", 1)])
def test_a_checkpoint_is_read_by_another_number_of_processes(trained, train, tmp_path, name, processes):
    run = shutil.copytree(trained(name), tmp_path / "run", symlinks=True)
    model = torch.load(run / "model.pt", weights_only=True)
    (run / "model.pt").unlink()
    train("run", processes, "trainer.batch_size=1", "trainer.steps=4", *FOUR, *DMD)  # it only loads and exports
    again = torch.load(run / "model.pt", weights_only=True)
    assert all(torch.equal(t, again[n][k]) for n in model.keys() - {"step", "config"} for k, t in model[n].items())


@pytest.mark.parametrize(("name", "kills", "seconds"), [("alone", 3, 3.0), ("halves", 1, 60.0)])
def test_killed_runs_end_as_one_left_alone_to_the_last_bit(trained, release, tmp_path, name, kills, seconds):
    """The run of two processes is killed after its first checkpoint."""
    processes, options = SHARED[name]
    kill_often(flags(release, tmp_path / "killed", *options), processes, kills, seconds, seed=0)
    assert compare(trained(name), tmp_path / "killed") == []
    assert f"trainer.steps={len(repeated_metrics(trained(name)))}" in options


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])  # all four: test_distributed.py
def test_a_signal_to_one_process_ends_all_well_with_a_checkpoint(release, tmp_path, number):
    logdir = tmp_path / "run"
    group = launch(flags(release, logdir, "trainer.steps=100000", "trainer.batch_size=1", *DMD), 2)
    try:
        wait_for(lambda: (logdir / "metrics.jsonl").exists() and len(repeated_metrics(logdir)) >= 2)
        os.kill(group[1].pid, number)
        wait(group, timeout=60)
    finally:  # a failure leaves no training behind
        for process in group:
            process.kill()
    step = read_about(latest_checkpoint(logdir / "checkpoints"))["step"]
    assert step == step_reached(logdir / "checkpoints") == repeated_metrics(logdir)[-1]["step"] >= 2
    assert not (logdir / "model.pt").exists()


@pytest.fixture(scope="module")
def unlucky_run(release, tmp_path_factory) -> tuple[Path, float]:
    """A job in whose second step one process has a bad loss, and after whose third it dies; and the time of its end."""
    folder = tmp_path_factory.mktemp("unlucky") / "run"
    options = flags(release, folder, "trainer.steps=100000", "trainer.batch_size=1", *DMD)
    with pytest.raises(UserError, match="ended with"):
        wait(launch(options, 2, prepare=unlucky.prepare), timeout=120)
    return folder, time.time()


def test_a_process_that_dies_ends_the_job_with_its_message_within_seconds(unlucky_run):
    logdir, ended = unlucky_run
    main, other = (log_file(logdir, rank).read_text() for rank in range(2))
    assert "process 1 failed: RuntimeError: rank 1 is out of luck" in main
    assert ended - float(other.partition("died at ")[2].split()[0]) < 20


def test_a_bad_loss_of_one_process_skips_the_step_of_all(unlucky_run):
    logdir, _ = unlucky_run
    lines = repeated_metrics(logdir)
    assert [line["skipped"] for line in lines[:3]] == [0, 1, 1]
    assert lines[1]["critic_loss"] is None and lines[2]["critic_loss"] > 0
    record = json.loads((logdir / "skipped" / "step_00000002.json").read_text())
    assert len(record["prompts"]) == 2 and "step 2 was skipped" in log_file(logdir).read_text()


def test_bfloat16_passes_train_close_to_float32(train, trained):
    whole = trained("whole_of_two")
    half = train("bfloat16", 2, "trainer.batch_size=1", "trainer.steps=2", "parallel.precision=bfloat16", *DMD)
    states = torch.load(half / "model.pt", weights_only=True)
    assert all(tensor.dtype == torch.float32 for tensor in states["generator"].values())
    assert 0 < largest_difference(whole, half) < 1e-3
    first, other = (json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) for run in (whole, half))
    assert other["critic_loss"] == pytest.approx(first["critic_loss"], rel=0.05)


def wait_for(condition, timeout: float = 120) -> None:
    limit = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)
