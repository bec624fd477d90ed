"""The official commands on a whole fake release: inference reads every file by its published name and makes videos."""

import json

import pytest

import inference
from pipeline.loading import (
    CodecConfig,
    CodecKind,
    DenoiserConfig,
    TextConfig,
    load_codec,
    load_text_encoder,
    load_transformer,
)
from tests.fake_release import LARGE, SMALL, TAEHV, FakeRelease, write_fake_release
from utils.errors import UserError
from utils.video import read_video

# The published settings, at a size that a tiny model makes in a second.
CONFIG = """\
generator: {weights: checkpoints/self_forcing_dmd.pt}
rollout: {frames_per_chunk: 3}
video: {height: 32, width: 48, num_frames: 6}
dtype: float32
device: cpu
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> FakeRelease:
    release = write_fake_release(tmp_path_factory.mktemp("fake"))
    (release.root / "prompts").mkdir()
    (release.root / "prompts" / "example.txt").write_text("A stylish woman walks.\nAn octopus rests.\n")
    (release.root / "config.yaml").write_text(CONFIG)
    return release


@pytest.mark.parametrize("options", [[], ["codec.kind=tiny", "codec.weights=checkpoints/taew2_1.pth"]])
@pytest.mark.parametrize("weights", ["checkpoints/self_forcing_dmd.pt", "wan_models/Wan2.1-T2V-14B"])
def test_the_official_command_makes_videos(release, tmp_path, monkeypatch, options, weights):
    monkeypatch.chdir(release.root)
    command = f"--config_path config.yaml --output_folder {tmp_path} --checkpoint_path {weights}"
    command += " --data_path prompts/example.txt --use_ema"
    assert inference.main([*command.split(), *options]) == 0
    videos = sorted(tmp_path.glob("*.mp4"))
    assert len(videos) == 2
    assert read_video(videos[0]).shape == (21, 32, 48, 3)
    records = [json.loads(line) for line in (tmp_path / "videos.jsonl").read_text().splitlines()]
    assert {record["frames"] for record in records} == {21}
    assert len({record["weights"] for record in records}) == 1


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

    from model.text_encoder import load_tokenizer

    folder = release.small / "google" / "umt5-xxl"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    for sentence in ("A stylish woman walks down a street.", "一只猫"):
        assert load_tokenizer(folder)(sentence)["input_ids"] == [*pieces.encode(sentence), pieces.eos_id()]
