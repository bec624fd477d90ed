"""train.py from the command line: every objective trains, samples, saves and writes a model that inference.py loads."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import inference
import train
from model.transformer import WanTransformer
from model.weights import load_into, load_state_dict
from scripts import make_ode_pairs
from scripts.endurance.kills import launch, log_file, repeated_metrics, wait
from tests.made_once import made_once
from tests.shapes_parts import SIZES
from trainer.config import Config
from trainer.trainer import Trainer
from utils.checkpoint_search import latest_checkpoint
from utils.config import from_dict, load_config
from utils.video.read import read_video

pytest_plugins = ["tests.shapes_parts"]

REPOSITORY = Path(__file__).resolve().parents[1]
DIFFUSION = "objective=diffusion"
TEXT = ("text_encoder.weights=null", "diffusion.train_text_encoder=true", "trainer.export_dtype=float16")
RUNS = {
    "autoencoder": ("objective=autoencoder", "optimizer.kind=muon"),
    "bidirectional": (DIFFUSION, "optimizer.kind=muon", *TEXT),
    "diffusion forcing": (DIFFUSION, "diffusion.forcing=diffusion_forcing", "diffusion.bell_weights=true"),
    "teacher forcing": (DIFFUSION, "diffusion.forcing=teacher_forcing", "diffusion.sigma_floor=0.4"),
    "ode regression": ("objective=ode_regression",),
    "self-forcing dmd": ("dmd.replay_rollouts=2", "dmd.real_guidance_scale=1.0"),
    "self-forcing sid": ("objective=self_forcing_sid", "sid.alpha=0.5"),
    "self-forcing gan": (
        "objective=self_forcing_gan",
        "gan.r1_weight=0.1",
        "gan.r2_weight=0.1",
        "gan.heads.depths=[1.0]",
    ),
    "causvid": ("objective=causvid",),
    "consistency": ("objective=causal_consistency", "consistency.solver_steps=8"),
}
DISTILLED = ("self-forcing dmd", "self-forcing sid", "self-forcing gan", "causvid")
LOADED = {"generator": "generator.weights", "codec": "codec.weights", "text_encoder": "text_encoder.weights"}


@pytest.fixture(scope="session")
def run_folder(release, tmp_path_factory) -> Callable[[str], Path]:
    """Give a function that returns the folder of a run of RUNS with two equal trainings, `first` and `second`."""

    def make_pairs(_: Path) -> None:
        assert make_ode_pairs.main(["--config_path", release.config_path, "--count", "4", "--solver_steps", "4"]) == 0

    def run_folder(name: str) -> Path:
        def train_twice(folder: Path) -> None:
            for run in ("first", "second"):
                logdir = ["--logdir", str(folder / run)]
                assert train.main(["--config_path", release.config_path, *logdir, *RUNS[name]]) == 0

        if name == "ode regression":
            made_once(tmp_path_factory, "release/pairs", make_pairs)
        return made_once(tmp_path_factory, f"train {name}", train_twice)

    return run_folder


@pytest.fixture(
    scope="session", params=RUNS
)  # tests of one run come one after the other, so that two workers train different ones
def run(request, run_folder) -> tuple[str, Path]:
    return request.param, run_folder(request.param) / "first"


def metrics(logdir: Path) -> list[dict]:
    return repeated_metrics(logdir)


def checkpoint(logdir: Path) -> Path:
    return logdir / "model.pt"


def test_a_run_writes_finite_metrics_of_every_step(run):
    name, logdir = run
    lines = metrics(logdir)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    expected = {"generator_loss", "critic_loss"} if name in DISTILLED else {"loss"}
    if name in DISTILLED:
        gan = {"adversarial_loss", "adversarial_gradient", "real_logit", "fake_logit", "penalty", "discriminator_loss"}
        expected |= gan if name == "self-forcing gan" else {"score_gradient"}
    assert expected <= set(lines[0])


def test_the_same_run_twice_gives_the_same_numbers_to_the_last_bit(run):
    _, logdir = run
    again = logdir.with_name("second")
    assert metrics(logdir) == metrics(again)
    first, second = (torch.load(checkpoint(folder), weights_only=True) for folder in (logdir, again))
    for name in first.keys() - {"step", "config"}:
        assert all(torch.equal(tensor, second[name][key]) for key, tensor in first[name].items())


def test_a_run_writes_samples_of_its_prompts(run, release):
    _, logdir = run
    folder = logdir / "samples" / "step_000003"
    assert sorted(path.name for path in folder.iterdir()) == ["00.mp4", "01.mp4", "contact_sheet.png"]
    assert read_video(folder / "00.mp4").shape == (21, 96, 96, 3)
    with Image.open(folder / "contact_sheet.png") as sheet:
        sheet.load()


def test_a_runs_configuration_reads_back(run, release):
    name, logdir = run
    expected = release.config(*RUNS[name])
    assert load_config(Config, logdir / "config.yaml") == expected
    assert from_dict(Config, torch.load(checkpoint(logdir), weights_only=True)["config"], "checkpoint") == expected


def test_a_checkpoint_has_the_official_layout(run):
    name, logdir = run
    content = torch.load(checkpoint(logdir), weights_only=True)
    trained = {
        "autoencoder": {"codec", "codec_ema"},
        "bidirectional": {"generator", "generator_ema", "text_encoder", "text_encoder_ema"},
        "self-forcing gan": {"generator", "generator_ema", "critic", "discriminator_heads"},
        **{each: {"generator", "generator_ema", "critic"} for each in DISTILLED if each != "self-forcing gan"},
    }.get(name, {"generator", "generator_ema"})
    assert content.keys() == trained | {"step", "config"}
    assert content["step"] == 3
    if name == "autoencoder":
        return
    states = {use_ema: load_state_dict(checkpoint(logdir), use_ema=use_ema) for use_ema in (True, False)}
    assert any(not torch.equal(tensor, states[True][key]) for key, tensor in states[False].items())
    for use_ema, state in states.items():
        load_into(WanTransformer(SIZES), state, source=f"{use_ema=}")


def test_tied_weights_are_averaged_under_both_their_names(run_folder):
    content = torch.load(checkpoint(run_folder("bidirectional") / "first"), weights_only=True)
    averaged, trained = content["text_encoder_ema"], content["text_encoder"]
    assert torch.equal(averaged["model.shared.weight"], averaged["model.encoder.embed_tokens.weight"])
    assert not torch.equal(averaged["model.shared.weight"], trained["model.shared.weight"])


def test_inference_makes_a_video_with_what_a_run_leaves(run, release, tmp_path):
    _, logdir = run
    parts = [f"{LOADED[part.name]}={part}" for part in (logdir / "model").iterdir() if part.is_dir()]
    assert parts
    flags = ["--config_path", release.config_path, "--output_folder", str(tmp_path), "--prompt", "a cat"]
    assert inference.main([*flags, *parts]) == 0
    assert len(read_video(tmp_path / "a cat-0.mp4")) == 21


def test_the_exported_generator_is_the_average_in_the_dtype_asked_for(run_folder):
    for name, dtype in (("bidirectional", torch.float16), ("self-forcing dmd", torch.float32)):
        logdir = run_folder(name) / "first"
        exported, averaged = load_state_dict(logdir / "model" / "generator"), load_state_dict(checkpoint(logdir))
        assert all(torch.equal(tensor, averaged[key].to(dtype)) for key, tensor in exported.items())


def test_samples_checkpoints_and_exports_come_as_often_as_asked(release, tmp_path):
    flags = ["--config_path", release.config_path, "objective=autoencoder", "trainer.steps=4"]
    often = ["trainer.sample_every=2", "trainer.save_every=3", "trainer.export_every=2"]
    assert train.main([*flags, *often, "--logdir", str(tmp_path / "often")]) == 0
    assert train.main([*flags, *often[:2], "--no_save", "--no_visualize", "--logdir", str(tmp_path / "rarely")]) == 0

    def written(folder: str, pattern: str) -> list[str]:
        return sorted(path.name for path in (tmp_path / folder).glob(pattern))

    assert written("often", "samples/*") == ["step_000002", "step_000004"]
    assert written("often", "checkpoints/step_*") == ["step_00000003", "step_00000004"]
    assert written("often", "*.pt") == ["model.pt", "model_000002.pt", "model_000004.pt"]
    assert written("rarely", "samples/*") == ["step_000004"]
    assert written("rarely", "checkpoints/step_*") == ["step_00000004"]
    assert written("rarely", "*.pt") == ["model.pt"]


def test_a_codec_that_trains_on_keeps_its_encoder(release, tmp_path):
    flags = ["--config_path", release.config_path, "objective=autoencoder", "trainer.steps=1", "--no_visualize"]
    given = release.folder / "codec"
    assert train.main([*flags, f"autoencoder.weights={given}", "--logdir", str(tmp_path)]) == 0
    before, after = load_state_dict(given), load_state_dict(tmp_path / "model" / "codec")
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}


def test_a_run_goes_on_by_itself_or_starts_anew_without_losing_what_was_there(release, tmp_path):
    flags = ["--config_path", release.config_path, "objective=autoencoder", "--no_visualize", "--logdir", str(tmp_path)]
    assert train.main([*flags, "trainer.steps=2"]) == 0
    assert train.main([*flags, "trainer.steps=3"]) == 0
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step_00000003"
    assert train.main([*flags, "trainer.steps=1", "--no_resume"]) == 0
    assert [line["step"] for line in metrics(tmp_path)] == [1]
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step_00000001"
    assert latest_checkpoint(tmp_path / "checkpoints.old1").name == "step_00000003"


def test_a_checkpoint_of_another_model_or_data_is_refused(release, tmp_path, capsys):
    flags = ["--config_path", release.config_path, "objective=autoencoder", "--no_visualize", "--logdir", str(tmp_path)]
    assert train.main([*flags, "trainer.steps=1"]) == 0
    assert train.main([*flags, "objective=self_forcing_dmd"]) == 2
    assert "does not fit this run" in capsys.readouterr().err.splitlines()[-1]


def fill_disk() -> None:
    """In a process of its own: no file may grow beyond 20 kB while the second checkpoint is written."""
    import resource

    save = Trainer.save

    def full(self, checkpoints):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if self.step == 2 else limits[0], limits[1]))
        save(self, checkpoints)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    Trainer.save = full


def test_a_disk_that_is_full_ends_no_training(release, tmp_path):
    flags = ["--config_path", release.config_path, "--no_visualize", "--logdir", str(tmp_path / "run")]
    wait(launch([*flags, "objective=autoencoder", "trainer.save_every=1"], prepare=fill_disk), timeout=240)
    said = log_file(tmp_path / "run").read_text()
    assert "checkpoint of step 2 could not be written" in said and "step_00000001 is still good" in said
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert kept == ["step_00000001", "step_00000003"]


def test_dry_run_prints_a_configuration_that_reads_back(release, tmp_path, capsys):
    flags = ["--config_path", release.config_path, "--logdir", str(tmp_path / "run"), "--no_visualize", "--dry-run"]
    assert train.main([*flags, "trainer.steps=7", "trainer.sample_every=3"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(Config, tmp_path / "printed.yaml") == release.config("trainer.steps=7")
    assert not (tmp_path / "run").exists()


BAD_INPUT = {
    "override typo": (["trainer.step=7"], "unknown key trainer.step=7; did you mean trainer.steps?"),
    "wrong type": (["optimizer.lr=fast"], "optimizer.lr='fast' is not of type float"),
    "unknown objective": (["objective=dmd"], "objective='dmd' is not one of"),
    "a world that does not divide": (
        ["objective=autoencoder", "data.shapes.resolution=50"],
        "data.shapes.resolution=50 is not a multiple of 4, the side of the codec's blocks",
    ),
    "an empty path": (["codec.weights="], "codec.weights is empty; give a path, or leave it out"),
    "no steps": (["trainer.steps=0"], "trainer: steps=0 must be at least 1"),
    "unknown device": (["device=gpu"], "unknown device 'gpu'"),
    "missing student": (["student.weights={tmp}/nowhere"], "{tmp}/nowhere: no such file"),
    "missing pairs": (["objective=ode_regression", "ode.pairs={tmp}"], "ode.pairs={tmp}: holds no items"),
    "missing sample prompts": (["data.sample_prompts={tmp}/nowhere.txt"], "{tmp}/nowhere.txt: no such prompt file"),
    "sample prompts of another world": (
        ["objective=autoencoder", "data.sample_prompts={release}/prompts.txt"],
        "'a large red circle on a navy background' is not a Shapes prompt",
    ),
    "sample prompts of the rich world": (
        ["objective=autoencoder", "data.sample_prompts=prompts/shapes_rich.txt"],
        "is a scene of the rich world: set data.shapes.world=rich",
    ),
    "missing codec": (["objective=autoencoder", "autoencoder.weights={tmp}/nowhere"], "{tmp}/nowhere"),
    "no training prompts": (["data.kind=prompts"], "data.path is null"),
    "no training videos": ([DIFFUSION, "data.kind=prompts"], "data.kind=prompts has no videos"),
    "batch that does not divide": (
        ["trainer.total_batch_size=3"],
        "trainer.total_batch_size=3 is not a multiple of 2 = trainer.batch_size=2 x 1 processes",
    ),
    "shards that do not divide": (["parallel.shard_size=2"], "parallel.shard_size=2 does not divide the 1 processes"),
    "length of a rollout": (["video.num_frames=7"], "num_frames=7 is not a multiple of frames_per_chunk=3"),
    "length of a causal clip": ([*RUNS["teacher forcing"], "video.num_frames=7"], "num_frames=7 is not a multiple"),
    "unknown codec": (
        ["objective=autoencoder", "autoencoder.preset=shape"],
        "autoencoder.preset='shape' is not one of",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_a_mistake_ends_before_the_first_step(release, tmp_path, capsys, overrides, message):
    names = {"tmp": tmp_path, "release": release.folder}
    logdir = ["--logdir", str(tmp_path / "run")]
    overrides = [text.format(**names) for text in overrides]
    assert train.main(["--config_path", release.config_path, *logdir, *overrides]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message.format(**names) in last
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or metrics(tmp_path / "run") == []


def test_an_empty_logdir_is_refused(release, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--config_path", release.config_path, "--logdir", ""])
    assert ended.value.code == 2 and "required: --logdir" in capsys.readouterr().err


def test_a_logdir_that_is_a_file_is_refused(release, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert train.main(["--config_path", release.config_path, "--logdir", str(tmp_path / "file")]) == 2
    assert f"cannot write to the folder {tmp_path / 'file'}" in capsys.readouterr().err


def test_a_run_speaks_on_stderr_alone(release, tmp_path, capfd):
    """As a program of its own it runs in tests/test_readme.py."""
    flags = ["--config_path", release.config_path, "--logdir", str(tmp_path / "run")]
    assert train.main([*flags, "objective=autoencoder", "trainer.steps=1"]) == 0
    out, err = capfd.readouterr()
    assert "step 1/1  loss" in err and out == ""
    assert (tmp_path / "run" / "model" / "codec" / "model.safetensors").is_file()
