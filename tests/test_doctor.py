"""doctor.py describes a machine, tests every code path on it, and ends with the line of a failed check."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.kernels import AttentionBackend
from pipeline.config import load_pipeline_config
from scripts import doctor
from scripts.checks import facts, selftest, speed
from scripts.checks.selftest import Check, CheckFailed, Skipped, perform
from scripts.measuring import floors, peers, sessions
from scripts.measuring.figures import GOALS, is_known
from scripts.runs import doctor as runs

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
BLOCKED = ("av", "gradio", "diffusers", "triton")
ENTRY = """
import sys
sys.modules |= dict.fromkeys({blocked}, None)  # so that each of these imports raises
sys.path.insert(0, ".")
for name, program in {programs}.items():
    exec(program)
    assert code == 0, name
"""


@pytest.fixture
def without_compiler(monkeypatch):
    """Skip compilation, which takes most of a minute. tests/pipeline/test_optimize.py compiles the same blocks."""
    monkeypatch.setattr(selftest, "compiler", lambda device: None)


def test_a_healthy_machine_passes_and_everything_is_in_the_file(without_compiler, tmp_path, capsys):
    assert doctor.main(["--device", "cpu", "--json", str(tmp_path / "doctor.json")]) == 0
    report = json.loads((tmp_path / "doctor.json").read_text())
    printed = capsys.readouterr().out
    assert report["machine"]["torch"] == torch.__version__ and report["packages"]["einops"] != "-"
    assert (
        report["attention kernels"]["auto"].startswith("uses sdpa") and report["attention kernels"]["sdpa"] == "can run"
    )
    assert "GB" in report["memory"]["configs/self_forcing_dmd.yaml"]
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert "failed" not in states.values() and states["rollout in float32, compiled"] == "skipped"
    for name in (
        "rollout in bfloat16",
        "session with the wan codec in bfloat16",
        "training step",
        "two sessions in turn",
    ):
        assert states[name] == "ok" and name in printed
    assert f"{len([s for s in states.values() if s == 'ok'])} of" in printed


def test_what_fails_is_the_last_line_and_exit_code_1(without_compiler, monkeypatch, capsys):
    monkeypatch.setattr(selftest, "run_kernel", lambda backend, q, k, v: torch.zeros_like(q))
    monkeypatch.setattr(selftest, "all_checks", lambda device: [
        Check("attention kernel sdpa", lambda: selftest.check_kernel(device, AttentionBackend.sdpa))
    ])  # fmt: skip
    assert doctor.main(["--device", "cpu"]) == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == "FAILED: attention kernel sdpa: relative difference 1 is above 0.02"


def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(capsys):
    assert doctor.main(["--config_path", "/none.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: /none.yaml")


def test_a_check_passes_fails_or_is_skipped_with_its_reason():
    def error():
        raise RuntimeError("No available kernel\nmore lines")

    def skip():
        raise Skipped("needs a CUDA device")

    assert perform(Check("a", lambda: "fine")).state == "ok"
    assert (perform(Check("a", error)).state, perform(Check("a", error)).detail) == (
        "failed",
        "RuntimeError: No available kernel",
    )
    assert (perform(Check("a", skip)).state, perform(Check("a", skip)).detail) == ("skipped", "needs a CUDA device")
    with pytest.raises(CheckFailed, match="difference nan is above 1"):
        selftest.within(float("nan"), 1.0)


def test_kernel_choice_in_two_threads_is_reported(monkeypatch):
    def broken(*_):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(selftest, "run_kernel", broken)
    outcome = perform(Check("threads", lambda: selftest.check_threads(CPU)))
    assert (outcome.state, outcome.detail) == ("failed", "RuntimeError: No available kernel. Aborting execution.")


def test_a_training_step_changes_the_losses():
    from scripts.checks.parts import tiny_denoiser
    from scripts.checks.training import training_losses

    losses = training_losses(tiny_denoiser, CPU, compiled=False)
    assert len(losses) == 4 and all(loss > 0 for loss in losses)
    assert losses[0] != losses[2] and losses[1] != losses[3]


def test_the_memory_of_full_size_parts_is_known_without_files():
    config = load_pipeline_config(ROOT / "configs" / "self_forcing_dmd.yaml")
    sizes = facts.preset_sizes(config, CPU, torch.bfloat16)
    assert sizes.generator.total == pytest.approx(2.84e9, rel=0.01)
    assert sizes.codec.total == pytest.approx(0.254e9, rel=0.01)
    assert "weights are not on disk" in facts.memory_profile(config, CPU, torch.bfloat16)


def test_the_table_of_speed_is_measured_to_its_end_with_a_tiny_model(monkeypatch, tmp_path, capsys):
    """Every row of a CPU, with the figures by the names of benchmark.py."""
    monkeypatch.setattr(selftest, "all_checks", lambda device: [])
    monkeypatch.setattr(floors, "FLOOR_SIZES", floors.FLOOR_SIZES | {"dim": 24, "ffn_dim": 32, "num_layers": 1})
    monkeypatch.setattr(floors, "FLOOR_LATENT", (4, 4))
    monkeypatch.setattr(peers, "PEER_LATENTS", (3, 2, 2))
    monkeypatch.setattr(sessions, "VIEWERS", (2,))
    monkeypatch.setattr(speed, "TINY", (*speed.TINY, "video.height=16", "video.width=16", "video.num_frames=3"))
    rows = [row._replace(repeats=1) for row in speed.rows(CPU)]
    monkeypatch.setattr(runs, "rows", lambda device: rows)
    report_file = tmp_path / "doctor.json"
    assert doctor.main(["--device", "cpu", "--benchmark", "--json", str(report_file)]) == 0
    measured, printed = json.loads(report_file.read_text())["benchmark"], capsys.readouterr().out
    assert measured.keys() == {row.title for row in rows} and len(rows) >= 4
    for row in rows:
        assert f"{row.title} (benchmark.py {row.name})" in printed
        assert all(is_known(row.name, figure) and value > 0 for figure, value in measured[row.title].items())
    assert "goal: at most 1.12" in printed


def test_every_goal_is_a_figure_of_a_row(monkeypatch):
    monkeypatch.setattr(speed, "installed", lambda package: "1.0")
    known = {row.title: row.name for kind in ("cpu", "cuda") for row in speed.rows(torch.device(kind))}
    for goal in GOALS:
        assert goal.row in known and is_known(known[goal.row], goal.figure), goal


def test_the_page_of_performance_shows_every_goal():
    page = (ROOT / "docs" / "performance.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    shown = {(row[0].strip("`"), row[1].strip("`"), row[3]) for row in rows if len(row) == 5}
    for goal in GOALS:
        assert (goal.row, goal.figure, str(goal)) in shown, goal


def test_the_table_of_speed_uses_the_names_of_benchmark_py(monkeypatch):
    """Each row is a measurement of benchmark.py whose configuration loads."""
    from scripts.benchmark import MEASURES
    from scripts.measuring.figures import FIGURES

    monkeypatch.setattr(speed, "installed", lambda package: "1.0")
    assert FIGURES.keys() == MEASURES.keys()
    for kind in ("cpu", "cuda"):
        table = list(speed.rows(torch.device(kind)))
        assert len(table) >= 5 and len({row.title for row in table}) == len(table)
        for row in table:
            assert row.name in MEASURES
            load_pipeline_config(ROOT / row.config_path, row.overrides)


PROGRAMS = {
    "doctor": "from scripts import doctor; from scripts.checks import selftest; "
    "selftest.compiler = lambda device: None; code = doctor.main(['--device', 'cpu'])",
    "floor": "from scripts import benchmark; from scripts.measuring import floors; "
    "floors.FLOOR_SIZES |= {'dim': 24, 'ffn_dim': 32, 'num_layers': 1}; floors.FLOOR_LATENT = (4, 4); "
    "code = benchmark.main(['floor', '--repeats', '1', 'device=cpu'])",
    "inference": "from scripts import benchmark; code = benchmark.main(['inference', '--random-weights', "
    "'--frames', '3', '--repeats', '1', 'device=cpu', 'generator.preset=shapes', 'video.height=64', 'video.width=64'])",
    "videos": "import pipeline.inference.run; code = 0",
}


def test_packages_that_are_not_needed_are_not_imported():
    """doctor.py works without av, gradio, diffusers and others that only some code paths use."""
    source = ENTRY.format(blocked=BLOCKED, programs=PROGRAMS)
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
