"""The reproduction: a fair plan, measures that measure, and a run that goes on where it stopped."""

import csv
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts import reproduce
from scripts.reproduction.measuring import REAL, measure_method, measure_real, measured_file, read_measured
from scripts.reproduction.metrics import flicker, frechet_distance, path_error
from scripts.reproduction.plan import ABLATIONS, FULL, METHODS, QUICK, ReproductionPlan, Training, build_plan
from scripts.reproduction.report import write_reproduction
from scripts.reproduction.runner import estimate_left
from scripts.reproduction.statistics import difference_interval, frechet_interval, mean_interval
from scripts.reproduction.training import commands, run_program, train_all, weights_of
from trainer.config import Config
from utils.config import load_config
from utils.errors import UserError
from utils.shapes import Scene, ShapesConfig, measure, positions, render_at

REPOSITORY = Path(__file__).resolve().parents[1]
SCENE = Scene("circle", "red", "large", "up and right", "navy")
TINY = replace(QUICK, prompts=1, steps=1, start_steps=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("budget", [QUICK, replace(FULL, forms=("chunkwise",))], ids=["quick", "full"])
def test_the_plan_is_fair_and_in_order(budget):
    """Every method has the same updates and clips, from a student that was trained before."""
    plan = build_plan(budget)
    known, methods = {}, set(METHODS)
    for training in plan.trainings:
        assert training.name not in known and (training.start is None or training.start in known)
        known[training.name] = training
    for row in (row for row in plan.rows if row.main):
        runs = [known[name] for name in row.trainings]
        assert [(run.seed, run.steps) for run in runs] == [(seed, budget.steps) for seed in budget.seeds]
        config = config_of(runs[-1], Path("logs")) if row.form == "framewise" else None
        assert config is None or (config.trainer.steps, config.trainer.batch_size) == (budget.steps, 8)
        methods -= {method for method in METHODS if row.method.startswith(method)}
    assert not methods, "a method without a row"
    assert len({row.name for row in plan.rows}) == len(plan.rows)


def config_of(training: Training, folder: Path) -> Config:
    """The configuration of the last command: that of train.py."""
    (*_, command) = commands(training, folder)
    return load_config(Config, REPOSITORY / command[2], command[command.index("--no_visualize") + 1 :])


def test_teacher_forcing_dmd_sees_clean_context_and_variants_change_what_they_name():
    trainings = {training.name: training for training in build_plan(FULL).trainings}
    assert config_of(trainings["framewise-tf-dmd-0"], Path("logs")).dmd.clean_context
    assert not config_of(trainings["framewise-df-dmd-0"], Path("logs")).dmd.clean_context
    plain = config_of(trainings["chunkwise-self-forcing-dmd-0"], Path("logs"))
    for label in ABLATIONS:
        varied = config_of(trainings[f"chunkwise-self-forcing-dmd-{label.replace(' ', '-')}-0"], Path("logs"))
        assert varied.rollout.frames_per_chunk == 3 and varied != plain, label
    started = config_of(trainings["framewise-self-forcing-dmd-from-causal-ode-0"], Path("logs"))
    assert started.student.weights == str(weights_of(Path("logs"), "framewise-causal-ode-0"))


def test_a_path_error_is_the_distance_from_exact_physics():
    config = ShapesConfig()
    exact = positions([SCENE], torch.tensor([[12.0, 30.0]]), 60, config)
    drifting = exact + torch.linspace(0, 3, 60)[None, :, None] * torch.tensor([0.0, 1.0])

    def error(path: torch.Tensor) -> float:
        return path_error(measure(render_at([SCENE], path)[0], SCENE, config), SCENE, config)

    assert error(exact) < 0.15 and error(drifting) == pytest.approx(1.5, abs=0.3)
    lost = exact.clone()
    lost[:, 30:] = -100
    assert error(lost) == pytest.approx(12, abs=0.5), "a missing object counts as half the frame's side"


def test_flicker_and_the_frechet_distance_are_zero_only_for_what_is_equal():
    still = torch.zeros(6, 3, 8, 8)
    assert flicker(still) == 0
    assert flicker(still + 0.02 * torch.arange(6)[:, None, None, None]) == pytest.approx(2.55, abs=0.01)
    features = torch.randn(200, 4, generator=seeded())
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 2) == pytest.approx(16, abs=1e-3)
    assert frechet_distance(features, 3 * features) > 1


def test_intervals_shrink_with_more_prompts_and_cover_the_mean():
    drawn = torch.rand(3, 400, generator=seeded()).tolist()
    many, few = mean_interval(drawn), mean_interval([row[:10] for row in drawn])
    assert many.low < 0.5 < many.high and many.high - many.low < few.high - few.low
    assert mean_interval([[1.0, 1.0], [1.0, 1.0]]) == (1, 1, 1)
    features = torch.randn(20, 5, 3, generator=seeded())
    near, far = frechet_interval(features, [features]), frechet_interval(features, [features + 1])
    assert near.high < far.low


def test_a_difference_of_the_same_prompts_and_seeds_is_seen_where_the_means_overlap():
    theirs = torch.rand(3, 24, generator=seeded()).tolist()
    ours = [[value + 0.05 for value in row] for row in theirs]
    assert mean_interval(ours).low < mean_interval(theirs).high
    assert difference_interval(ours, theirs) == pytest.approx((0.05, 0.05, 0.05))
    assert difference_interval(ours[:1], theirs).mean == pytest.approx(0.05), "only the seeds of both count"
    noise = torch.randn(3, 24, generator=seeded(1)).tolist()
    between = difference_interval(noise, torch.randn(3, 24, generator=seeded(2)).tolist())
    assert between.low < 0 < between.high


def test_a_failed_training_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("raise SystemExit(2)", encoding="utf-8")
    with pytest.raises(UserError, match=r"teacher: .*broken\.py ended with code 2; correct .* it goes on from here"):
        run_program([str(tmp_path / "broken.py")], "teacher")


STUB = """\
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), (folder / "saved").touch(), sys.exit(0)))
(folder / "started").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_until_the_training_has_saved(tmp_path, number):
    (tmp_path / "stub.py").write_text(STUB, encoding="utf-8")
    call = f"run_program([{str(tmp_path / 'stub.py')!r}, {str(tmp_path)!r}], 'stub')"
    command = [sys.executable, "-c", f"from scripts.reproduction.training import run_program; {call}"]
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        wait_for((tmp_path / "started").exists)
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    assert (tmp_path / "saved").exists()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_goes_on_where_it_stopped_and_reports_what_it_has(tmp_path, monkeypatch):
    """Two rows of finished trainings, of which one is measured already; the shipped models stand in for them."""
    monkeypatch.chdir(REPOSITORY)
    plan = build_plan(TINY)
    chosen = {"Diffusion forcing 4 steps": "student", "Self Forcing DMD": "generator"}
    rows = tuple(replace(row, lengths=(4,)) for row in plan.rows if row.method in chosen)
    for row in rows:
        weights = weights_of(tmp_path, row.trainings[0])
        weights.parent.mkdir(parents=True)
        weights.symlink_to(REPOSITORY / "checkpoints" / "shapes" / chosen[row.method])
    finished = {row.trainings[0] for row in rows}
    plan = replace(plan, rows=rows, trainings=tuple(run for run in plan.trainings if run.name in finished))
    train_all(plan.trainings, tmp_path, ())
    whole = estimate_left(plan, tmp_path, 1.0)
    assert whole.training == 0, "finished trainings are kept"
    measure_real(TINY, tmp_path, (), (4,))
    measure_method(rows[0], TINY, tmp_path, ("rollout.frames_per_chunk=3",))
    assert estimate_left(plan, tmp_path, 1.0).measuring < whole.measuring
    first = measured_file(tmp_path, rows[0].name, 0)
    before = first.stat().st_mtime_ns
    for row in rows:
        measure_method(row, TINY, tmp_path, ("rollout.frames_per_chunk=3",))
    assert first.stat().st_mtime_ns == before
    real = read_measured(measured_file(tmp_path, REAL, 0))
    assert min(real.columns["4x"]["shape"] + real.columns["4x"]["all_right"]) >= 0.99
    notes = tmp_path / "report" / "reproduction" / "notes.md"
    notes.parent.mkdir(parents=True)
    notes.write_text("One row contradicts the paper.", encoding="utf-8")
    check_report(write_reproduction(plan, tmp_path, tmp_path / "report", "scripts/reproduce.sh --quick"))
    check_ablations(plan, tmp_path)


def check_ablations(plan: ReproductionPlan, folder: Path) -> None:
    """The same rows as ablations: the page compares the other row with self-forcing DMD."""
    rows = tuple(replace(row, main=False) for row in plan.rows)
    plan = replace(plan, budget=replace(plan.budget, main=False, ablations=True), rows=rows)
    page = write_reproduction(plan, folder, folder / "report", "scripts/reproduce.sh --quick --rows ablations")
    text = page.read_text(encoding="utf-8")
    assert page.name == "ablations.md" and (folder / "report" / "ablations" / "table.csv").is_file()
    assert "all right at 4x, against Self Forcing DMD (" in text and "](" not in text


def check_report(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "One row contradicts the paper." in text and "python train.py --config_path" in text
    assert "speed at 4x: Self Forcing DMD (" in text and "| Real clips after the codec | 1.000" in text
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert links and all((page.parent / link).is_file() for link in links)
    with (page.parent / "reproduction" / "table.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert {row["column"] for row in table} >= {"shape", "path_error", "flicker", "frechet", "speed"}
    assert all(float(row["low"]) <= float(row["mean"]) <= float(row["high"]) for row in table)


@pytest.mark.parametrize(("rows", "counted"), [("main", (10, 10)), ("ablations", (21, 16)), ("all", (28, 25))])
def test_it_says_how_long_it_takes_and_starts_nothing(tmp_path, capsys, rows, counted):
    assert reproduce.main(["--quick", "--rows", rows, "--plan", "--folder", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().err
    assert "{} trainings and {} rows; about".format(*counted) in said and "are left on this machine" in said
    assert not (tmp_path / "new").exists()


def test_more_seeds_and_both_forms_keep_what_fewer_ones_trained(monkeypatch):
    planned = []
    monkeypatch.setattr("scripts.runs.reproduce.reproduce", lambda budget, **_: planned.append(build_plan(budget)))
    for more in ([], ["--seeds", "3", "--form", "both"]):
        assert reproduce.main(["--quick", *more]) == 0
    few, many = planned
    assert few.trainings == many.trainings[: len(few.trainings)], "the first seed comes first, whole"
    assert len(many.trainings) == 6 * len(few.trainings) and len(many.rows) == 2 * len(few.rows)
    assert {row.name for row in few.rows} < {row.name for row in many.rows}


def test_a_count_without_prompts_is_refused_before_anything_starts(tmp_path, capsys):
    assert reproduce.main(["--quick", "--prompts", "97", "--folder", str(tmp_path / "new")]) == 2
    assert "--prompts=97 must be from 1 to 96" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
