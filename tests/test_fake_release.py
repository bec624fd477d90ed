"""The official commands work on a complete fake release: inference reads every published file and makes videos."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import inference
from pipeline.config import CodecConfig, CodecKind, DenoiserConfig, TextConfig
from pipeline.generation import generate
from pipeline.loading import load_codec, load_text_encoder, load_transformer
from pipeline.memory import PROFILES, Profile
from pipeline.request import StreamRequest
from pipeline.text_to_video import load_pipeline
from tests.fake_release import LARGE, SMALL, TAEHV, FakeRelease, copy_fake_release
from trainer.config import Config
from utils.config import load_config
from utils.errors import UserError
from utils.video.read import read_video

pytest_plugins = ["tests.shapes_parts"]

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = """\
python inference.py --config_path configs/self_forcing_dmd.yaml --output_folder videos/self_forcing_dmd \
  --checkpoint_path checkpoints/self_forcing_dmd.pt --data_path prompts/example_extended.txt --use_ema"""
# Added to each command, because the published 81 frames of 480x832 take minutes on a CPU even with tiny weights.
TINY = ["video.height=32", "video.width=48", "video.num_frames=6"]
TAEHV_CODEC = ["codec.kind=tiny", "codec.weights=checkpoints/taew2_1.pth"]
DIFFUSERS = [
    "codec.weights=wan_models/Wan2.1-T2V-1.3B-Diffusers",
    "text_encoder.weights=wan_models/Wan2.1-T2V-1.3B-Diffusers",
    "text_encoder.tokenizer=null",
]
PROMPTS = ["A stylish woman walks down a street in Tokyo.", "An octopus rests on the ocean floor."]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> FakeRelease:
    """Give the files of a user: code, configurations and prompts of this repository, and the downloads; few prompts."""
    release = copy_fake_release(tmp_path_factory, tmp_path_factory.mktemp("fake"))
    for name in ("inference.py", "configs"):
        (release.root / name).symlink_to(REPOSITORY / name)
    (release.root / "prompts").mkdir()
    (release.root / "prompts" / "example_extended.txt").write_text("\n".join(PROMPTS) + "\n")
    Image.new("RGB", (60, 40), "teal").save(release.root / "prompts" / "first.png")
    line = json.dumps({"image": "first.png", "prompt": PROMPTS[0]})
    (release.root / "prompts" / "images.jsonl").write_text(line + "\n")
    return release


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Set a new home folder, for the cache of prompt embeddings."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def make(release, tmp_path, monkeypatch, home, restore_logging):
    """Give a function that runs inference.py in the release folder with few prompts and frames."""
    monkeypatch.chdir(release.root)

    def make(*arguments: str, config: str = "self_forcing_dmd") -> tuple[list[Path], list[dict]]:
        common = ["--config_path", f"configs/{config}.yaml", "--output_folder", str(tmp_path / "videos")]
        assert inference.main([*common, *TINY, *arguments]) == 0
        records = (tmp_path / "videos" / "videos.jsonl").read_text().splitlines()
        return sorted((tmp_path / "videos").glob("*.mp4")), [json.loads(record) for record in records]

    return make


def test_the_users_own_command_makes_videos(release, home):
    """The command runs in a shell in the release folder exactly as published. Only the size is added."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(home)}
    command = f"{COMMAND} {' '.join(TINY)}"
    done = subprocess.run(
        command, shell=True, cwd=release.root, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    folder = release.root / "videos" / "self_forcing_dmd"
    videos = sorted(folder.glob("*.mp4"))
    assert len(videos) == len(PROMPTS)
    assert all(read_video(video).shape == (21, 32, 48, 3) for video in videos)
    assert (folder / "contact_sheet.png").is_file()
    assert "memory: text encoder resident, VAE whole, generator resident" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--checkpoint_path", "checkpoints/self_forcing_dmd.pt", *TAEHV_CODEC],
        ["--checkpoint_path", "checkpoints/ode_init.pt"],
        ["--checkpoint_path", "wan_models/Wan2.1-T2V-14B"],
        ["--checkpoint_path", "wan_models/Wan2.1-T2V-1.3B-Diffusers", *DIFFUSERS],
    ],
    ids=["taehv", "ode_init", "sharded 14B", "diffusers"],
)
def test_other_files_of_the_release_make_videos(make, arguments):
    videos, records = make(*arguments)
    assert len(videos) == len(PROMPTS)
    assert read_video(videos[0]).shape == (21, 32, 48, 3)
    assert {record["frames"] for record in records} == {21}
    assert len({record["weights"] for record in records}) == 1


def test_a_video_starts_from_an_image(make):
    videos, records = make("--i2v", "--data_path", "prompts/images.jsonl", "video.num_frames=7")
    assert read_video(videos[0]).shape == (25, 32, 48, 3)
    assert records[0]["image"] == "prompts/first.png"


def test_the_many_step_teacher_makes_whole_clips_of_any_length(make):
    videos, records = make("sampling.steps=2", "video.num_frames=5", config="wan2.1")
    assert len(videos) == len(PROMPTS)
    assert read_video(videos[0]).shape == (17, 32, 48, 3)
    assert records[0]["settings"]["sampler"] == "many_step"
    assert records[0]["settings"]["sampling"]["guidance_scale"] > 1


@pytest.mark.parametrize(
    "other",
    [["text_encoder.weights={}/text_encoder", "text_encoder.tokenizer=null"], ["generator.weights={}/generator"]],
    ids=["text encoder", "generator"],
)
def test_parts_made_for_other_parts_are_refused(release, tmp_path, monkeypatch, capsys, home, restore_logging, other):
    monkeypatch.chdir(release.root)
    common = ["--config_path", "configs/self_forcing_dmd.yaml", "--output_folder", str(tmp_path / "videos")]
    shapes = REPOSITORY / "checkpoints" / "shapes"
    assert inference.main([*common, *TINY, *(argument.format(shapes) for argument in other)]) == 2
    assert "they do not belong together" in capsys.readouterr().err


def test_a_second_run_needs_no_text_encoder_and_makes_the_same_videos(make, release, home):
    text = release.small / "models_t5_umt5-xxl-enc-bf16.pth"
    first = [read_video(video) for video in make()[0]]
    assert len(list((home / ".cache" / "self-forcing" / "prompts").glob("*.safetensors"))) == len(PROMPTS)
    hidden = text.rename(text.with_suffix(".hidden"))
    try:
        again, records = make("--overwrite")
        assert inference.main(["--config_path", "configs/self_forcing_dmd.yaml", "--prompt", "A new one."]) == 2
    finally:
        hidden.rename(text)
    assert len(records) == len(PROMPTS)
    assert all(torch.equal(read_video(video), frames) for video, frames in zip(again, first, strict=True))


@pytest.fixture(scope="module")
def resident(release, tmp_path_factory) -> torch.Tensor:
    """Give the clip that every memory profile must make."""
    return make_clip(release, tmp_path_factory.mktemp("resident"), PROFILES[0])


def make_clip(release: FakeRelease, folder: Path, profile: Profile) -> torch.Tensor:
    """Make a clip that is large enough for tiles. Every weight is converted from its stored dtype."""
    config = load_config(Config, REPOSITORY / "configs" / "self_forcing_dmd.yaml")
    config.generator.weights = str(release.checkpoints / "self_forcing_dmd.pt")
    config.codec.weights = str(release.small / "Wan2.1_VAE.pth")
    config.text_encoder = TextConfig(str(release.small / "models_t5_umt5-xxl-enc-bf16.pth"), None, str(folder))
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "profile": profile, "prompts": PROMPTS}
    pipeline = load_pipeline(config, **options)
    return generate(pipeline, [StreamRequest(PROMPTS[0], 32, 320, num_frames=6)])


@pytest.mark.parametrize("profile", PROFILES[1:], ids=str)
def test_every_profile_makes_the_same_clip(release, resident, tmp_path, profile):
    """All profiles are equal to the last bit, except at the seams between tiles."""
    difference = (make_clip(release, tmp_path, profile) - resident).abs()
    if profile.tile_codec:
        assert difference.max() > 0 and difference.mean() < 0.02
    else:
        assert difference.max() == 0


def test_every_part_has_the_sizes_of_its_file(release):
    for weights, config in ((release.small, SMALL), (release.large, LARGE)):
        assert load_transformer(DenoiserConfig(weights=str(weights))).config == config
    wan = load_codec(CodecConfig(weights=str(release.small / "Wan2.1_VAE.pth")))
    tiny = load_codec(CodecConfig(kind=CodecKind.tiny, weights=str(release.checkpoints / "taew2_1.pth")))
    assert tiny.config == TAEHV
    assert wan.latent_channels == tiny.latent_channels == SMALL.in_dim
    assert wan.spatial_scale == tiny.spatial_scale == 8
    text = TextConfig(weights=str(release.small / "models_t5_umt5-xxl-enc-bf16.pth"), tokenizer=None)
    encoder = load_text_encoder(text)
    assert (encoder.dim, encoder.text_len) == (SMALL.text_dim, SMALL.text_len)


def test_files_in_the_wrong_place_are_named(release):
    wrong = str(release.checkpoints / "ode_init.pt")
    with pytest.raises(UserError, match=r"ode_init.pt: is not a TAEHV"):
        load_codec(CodecConfig(kind=CodecKind.tiny, weights=wrong))
    with pytest.raises(UserError, match=r"ode_init.pt: is not the original Wan2.1 VAE"):
        load_codec(CodecConfig(weights=wrong))
    with pytest.raises(UserError, match=r"ode_init.pt: not a UMT5 encoder"):
        load_text_encoder(TextConfig(weights=wrong))
    with pytest.raises(UserError, match=r"Wan2.1_VAE.pth: not a Wan transformer"):
        load_transformer(DenoiserConfig(weights=str(release.small / "Wan2.1_VAE.pth")))


@pytest.mark.parametrize("missing", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"])
def test_a_missing_part_is_answered_with_its_download_command(missing):
    load = load_codec if missing == "Wan2.1_VAE.pth" else load_text_encoder
    config = (CodecConfig if load is load_codec else TextConfig)(weights=f"absent/Wan2.1-T2V-1.3B/{missing}")
    command = "hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir absent/Wan2.1-T2V-1.3B"
    with pytest.raises(UserError, match=rf"{missing}: no such file .*; download it: {command}$"):
        load(config)


def test_the_tokenizer_is_read_alike_from_both_of_its_files(release, tmp_path):
    import sentencepiece

    from model.tokenizer import load_tokenizer

    folder = release.small / "google" / "umt5-xxl"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    for sentence in ("A stylish woman walks down a street.", "一只猫"):
        assert load_tokenizer(folder)(sentence)["input_ids"] == [*pieces.encode(sentence), pieces.eos_id()]
