"""The scripts that prepare training data store the same values that a training would compute."""

import json
from pathlib import Path

import pytest
import torch

from model.attention import teacher_forcing_mask
from pipeline.loading import load_codec, load_denoiser, load_text_encoder
from pipeline.sampling import SamplingConfig, Solver
from scripts import cache_embeddings, encode_videos, make_ode_pairs
from scripts.runs.encode_videos import read_clip, video_prompts
from tests.shapes_parts import CODEC
from trainer.data import Contents, training_data, training_prompts
from trainer.draws import Draw
from trainer.objectives.consistency import causal_trajectory
from trainer.stored_data import ODEData, StoredEmbeddings
from utils.errors import UserError
from utils.shapes import ShapesConfig, all_scenes, render_clips
from utils.shards import Shards
from utils.video.write import VideoWriter

pytest_plugins = ["tests.shapes_parts"]


def test_cached_embeddings_equal_the_encoders_to_the_last_bit(release, tmp_path, capsys):
    (tmp_path / "more.txt").write_text("a cat on a mat\n")
    flags = ["--config_path", release.config_path, f"data.embeddings={tmp_path / 'embeds'}"]
    assert cache_embeddings.main([*flags, "--prompts", str(tmp_path / "more.txt"), "--shard_size", "100"]) == 0
    config = release.config()
    prompts = [*training_prompts(config.data, config.video), "a cat on a mat", config.sampling.negative_prompt]
    stored, encoder = StoredEmbeddings(tmp_path / "embeds"), load_text_encoder(config.text_encoder)
    with torch.no_grad():
        assert torch.equal(stored.encode(prompts), encoder.encode(prompts))
    sizes = {len(stored.shards.read(index, "embeds")) for index in range(len(stored.shards))}
    assert max(sizes) < stored.text_len and min(sizes) == 1  # padding is not stored; the empty prompt is one token

    capsys.readouterr()
    assert cache_embeddings.main(flags) == 0
    assert f"0 prompts encoded, {len(stored.shards) - 1} were there already" in capsys.readouterr().out


def save_video(path: Path, frames: torch.Tensor, fps: float) -> None:
    with VideoWriter(path, fps) as writer:
        writer.write(frames)


def test_encoded_videos_are_the_latents_of_their_first_frames(release, tmp_path, capsys):
    config = release.config()
    frames = render_clips(all_scenes()[:2], 25, torch.Generator().manual_seed(0), ShapesConfig())
    videos, folder = tmp_path / "videos", tmp_path / "latents"
    save_video(videos / "one.mp4", frames[0], config.video.fps)
    save_video(videos / "below" / "two.mp4", frames[1], config.video.fps)
    save_video(videos / "short.mp4", frames[1, :5], config.video.fps)
    (videos / "broken.mp4").write_bytes(b"no video")
    for name in ("one", "below/two", "short", "broken"):
        (videos / f"{name}.txt").write_text(f"{name} 🐈\n")
    flags = [str(videos), "--config_path", release.config_path, f"data.path={folder}"]
    assert encode_videos.main(flags) == 0
    out, err = capsys.readouterr()
    assert "2 videos encoded, 2 skipped, 0 were there already" in out
    assert "short.mp4: has 5 frames at 12 fps, but 21 are needed" in err and "cannot read a video from" in err

    reading = release.config("data.kind=videos", f"data.path={folder}")
    codec = load_codec(config.codec)
    stream = training_data(reading.data, Contents.clips, seed=0, video=reading.video, codec=codec)
    samples = stream.next(2)
    assert set(samples.prompts) == {"one 🐈", "below/two 🐈"}
    expected = codec.encode(frames[:, :21])[[samples.prompts.index(name) for name in ("one 🐈", "below/two 🐈")]]
    assert (samples.latents - expected).square().mean() < 0.02 * expected.square().mean()  # H.264 and half precision

    assert encode_videos.main(flags) == 0
    assert "0 videos encoded, 2 skipped, 2 were there already" in capsys.readouterr().out


def test_a_clip_keeps_its_speed_at_another_frame_rate(tmp_path, release):
    """Frame k of the clip is the frame shown at k / fps seconds. It has brightness k at any frame rate."""
    levels = torch.linspace(-1, 1, 24)
    save_video(tmp_path / "ramp.mp4", levels[:, None, None, None].expand(24, 3, 64, 96), fps=24)
    for fps, picked in ((24, slice(0, 6)), (12, slice(0, 12, 2)), (48, [0, 0, 1, 1, 2, 2])):
        video = release.config(f"video.fps={fps}").video
        frames = read_clip(tmp_path / "ramp.mp4", 6, video)
        assert frames.shape == (6, 3, 48, 48)
        assert torch.allclose(frames.mean(dim=(1, 2, 3)), levels[picked], atol=0.04)
    with pytest.raises(UserError, match="has 12 frames at 12 fps, but 13 are needed"):
        read_clip(tmp_path / "ramp.mp4", 13, release.config().video)


def test_causal_pairs_are_the_teachers_trajectories_after_the_clean_latents_they_hold(release, tmp_path):
    flags = ["--config_path", release.config_path, "--causal", "--solver_steps", "4", f"ode.pairs={tmp_path}"]
    assert make_ode_pairs.main([*flags, "--count", "3", "--batch", "2"]) == 0
    data, config = ODEData(tmp_path), release.config()
    samples = data.samples([Draw(item, 0) for item in range(3)])
    assert data.causal and data.num_frames == 6 and samples.states.shape == (3, 5, 6, CODEC.latent_channels, 12, 12)
    codec, encoder = load_codec(config.codec), load_text_encoder(config.text_encoder)
    with torch.no_grad():
        embeds, negative = encoder.encode(samples.prompts), encoder.encode([""] * 3)
    states = causal_trajectory(
        load_denoiser(config.real_score),
        samples.states[:, 0],
        samples.latents,
        embeds,
        negative,
        SamplingConfig(steps=4, solver=Solver.euler, guidance_scale=config.sampling.guidance_scale),
        teacher_forcing_mask(6, 3, window=config.rollout.window),
    )
    assert torch.allclose(samples.states, torch.stack(states, dim=1), atol=0.02)
    assert codec.decode(samples.latents).shape == (3, 21, 3, 48, 48)


def test_pairs_made_in_two_goes_equal_those_made_in_one(release, tmp_path):
    flags = ["--config_path", release.config_path, "--solver_steps", "4", "--batch", "1"]
    assert make_ode_pairs.main([*flags, "--count", "4", f"ode.pairs={tmp_path / 'once'}"]) == 0
    for count in ("2", "4"):
        assert make_ode_pairs.main([*flags, "--count", count, f"ode.pairs={tmp_path / 'twice'}"]) == 0
    once, twice = (Shards(tmp_path / name, key="", remedy="") for name in ("once", "twice"))
    assert once.records == twice.records and len(list((tmp_path / "twice").glob("*.safetensors"))) == 2
    assert all(torch.equal(once.read(item, "states"), twice.read(item, "states")) for item in range(4))
    about = json.loads((tmp_path / "once" / "about.json").read_text())
    assert about["timesteps"][0] == 1000 and about["timesteps"][-1] == 0


MISTAKES = {
    "no embeddings folder": (cache_embeddings, [], "data.embeddings is null; name the folder to fill"),
    "no such prompts": (
        cache_embeddings,
        ["--prompts", "nowhere.txt", "data.embeddings={tmp}/new"],
        "nowhere.txt: no such prompt file",
    ),
    "no videos folder": (encode_videos, ["{tmp}/nowhere", "data.path={tmp}/new"], "no such folder of videos"),
    "no videos": (encode_videos, ["{tmp}", "data.path={tmp}/new"], "holds no videos (.mp4"),
    "no output": (encode_videos, ["{tmp}"], "data.path is null; name the folder to fill"),
    "pairs of another solver": (
        make_ode_pairs,
        ["--count", "1", "--solver_steps", "8", "ode.pairs={tmp}/pairs"],
        "was begun with solver_steps=4, not 8",
    ),
}


@pytest.mark.parametrize(("script", "arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(release, tmp_path, capsys, script, arguments, message):
    if "pairs" in message or "solver" in message:
        flags = ["--config_path", release.config_path, "--count", "1", "--solver_steps", "4"]
        assert make_ode_pairs.main([*flags, f"ode.pairs={tmp_path}/pairs"]) == 0
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert script.main([*arguments, "--config_path", release.config_path]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1 and not (tmp_path / "new").exists()


def test_a_video_without_a_prompt_is_named(tmp_path):
    (tmp_path / "cat.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"cat\.mp4: has no prompt; write it to cat\.txt beside it"):
        video_prompts(tmp_path, None)
    listing = tmp_path / "prompts.jsonl"
    listing.write_text('{"video": "cat.mp4", "prompt": " a cat "}\n')
    assert video_prompts(tmp_path, listing) == {"cat.mp4": "a cat"}
    listing.write_text('{"video": "dog.mp4", "prompt": "a dog"}\n')
    with pytest.raises(UserError, match=r"video .*dog\.mp4 not found"):
        video_prompts(tmp_path, listing)


def test_companions_of_macos_are_no_videos(tmp_path):
    for name in ("cat.mp4", "._cat.mp4", "__MACOSX/cat.mp4", "below/._dog.MOV", "below/dog.MOV"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("cat.txt", "below/dog.txt"):
        (tmp_path / name).write_text("a prompt\nof two lines\n")
    prompts = video_prompts(tmp_path, None)
    assert prompts == dict.fromkeys(("below/dog.MOV", "cat.mp4"), "a prompt of two lines")
