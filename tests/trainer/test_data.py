"""Training data: draws are fair, resumable, and the same for any number of processes. Errors name what is missing."""

import json
from collections import Counter

import pytest
import torch
from PIL import Image

from pipeline.config import VideoConfig
from tests.shapes_parts import CODEC, tiny_codec
from trainer.data import (
    Contents,
    DataConfig,
    DataKind,
    PromptData,
    ShapesData,
    TrainingOrder,
    training_data,
    training_prompts,
)
from trainer.stored_data import ODEData, StoredEmbeddings
from utils.errors import UserError
from utils.shapes import Scene, ShapesConfig, World, held_out_scenes, measure
from utils.shards import ShardWriter

VIDEO = VideoConfig(height=48, width=48, num_frames=6, fps=12)
SHAPES = DataConfig(kind=DataKind.shapes)


@pytest.fixture(scope="module")
def codec():
    return tiny_codec()


def letters(seed: int = 0, items: str = "abcde") -> TrainingOrder:
    return TrainingOrder(PromptData(list(items)), seed)


def test_every_item_comes_once_before_any_comes_again_in_a_new_order():
    stream = letters()
    drawn = [item for _ in range(10) for item in stream.next(2).prompts]
    epochs = [drawn[start : start + 5] for start in range(0, 20, 5)]
    assert all(Counter(epoch) == Counter("abcde") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_may_be_larger_than_the_data_and_follows_the_seed():
    assert Counter(letters(items="ab").next(6).prompts) == {"a": 3, "b": 3}
    many = "".join(map(chr, range(100, 150)))
    assert letters(0, many).next(9) == letters(0, many).next(9)
    assert letters(0, many).next(9) != letters(1, many).next(9)
    with pytest.raises(ValueError, match="empty"):
        letters(items="")


def test_a_sample_is_a_function_of_its_index_whoever_reads_it():
    """Any number of processes sees the same prompts and pixels, also across the end of an epoch."""
    whole = TrainingOrder(ShapesData(ShapesConfig(), 2), 3)
    batch = whole.read(range(476, 484))
    for processes in (2, 4, 8):
        parts = [
            TrainingOrder(ShapesData(ShapesConfig(), 2), 3).read(range(476, 484)[r::processes])
            for r in range(processes)
        ]
        assert [parts[i % processes].prompts[i // processes] for i in range(8)] == batch.prompts
        frames = [parts[i % processes].frames[i // processes] for i in range(8)]
        assert torch.equal(torch.stack(frames), batch.frames)


def test_the_rich_world_gives_one_and_two_objects_that_the_detector_finds():
    config = ShapesConfig(world=World.rich)
    samples = TrainingOrder(ShapesData(config, 17), 0).next(6)
    scenes = [Scene.from_prompt(prompt) for prompt in samples.prompts]
    assert {len(scene.things) for scene in scenes} == {1, 2}
    for scene, clip in zip(scenes, samples.frames, strict=True):
        assert all(values.float().mean() > 0.9 for values in measure(clip, scene, config).columns.values())


def test_resuming_goes_on_with_the_sample_after_the_last():
    straight, stopped = letters(7), letters(7)
    expected = straight.next(8).prompts + straight.next(9).prompts
    first = stopped.next(8).prompts
    resumed = letters(99)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert first + resumed.next(9).prompts == expected and resumed.state_dict() == straight.state_dict()
    with pytest.raises(UserError, match="has 6 items, but had 5 when the checkpoint was made"):
        letters(items="abcdef").load_state_dict(stopped.state_dict())


def test_clips_show_their_prompts_and_never_a_held_out_scene(codec):
    stream = training_data(SHAPES, Contents.clips, seed=0, video=VIDEO, codec=codec)
    samples = stream.next(6)
    assert samples.frames.shape == (6, codec.num_frames(6), 3, 48, 48)
    shown = zip(samples.frames, samples.prompts, strict=True)
    assert all(measure(clip, Scene.from_prompt(prompt)).colour.all() for clip, prompt in shown)
    assert samples.encode(codec, torch.device("cpu")).shape == (6, 6, CODEC.latent_channels, 12, 12)
    assert not {scene.prompt for scene in held_out_scenes()} & set(training_prompts(SHAPES, VIDEO))


def test_the_first_frame_of_a_sample_is_that_of_its_clip(codec):
    first, clips = (
        training_data(SHAPES, contents, seed=4, video=VIDEO, codec=codec).next(3)
        for contents in (Contents.first_frames, Contents.clips)
    )
    assert torch.equal(first.frames, clips.frames[:, :1]) and first.prompts == clips.prompts


def test_prompts_and_prompt_image_pairs_are_read_from_files(tmp_path, codec):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    config = DataConfig(path=str(tmp_path / "prompts.txt"))
    prompts = training_data(config, Contents.prompts, seed=0, video=VIDEO, codec=codec)
    assert set(prompts.next(2).prompts) == {"a cat", "a dog"}

    Image.new("RGB", (96, 64), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "pairs.jsonl").write_text('{"image": "red.png", "prompt": "red"}\n')
    config = DataConfig(kind=DataKind.images, path=str(tmp_path / "pairs.jsonl"))
    samples = training_data(config, Contents.first_frames, seed=0, video=VIDEO, codec=codec).next(2)
    assert samples.prompts == ["red", "red"] and samples.frames.shape == (2, 1, 3, 48, 48)
    assert (samples.frames[:, 0, 0] == 1).all() and (samples.frames[:, 0, 1:] == -1).all()


def test_encoded_videos_are_cut_to_what_is_asked_for(tmp_path, codec):
    latents = torch.randn(6, CODEC.latent_channels, 12, 12).half()
    with ShardWriter(tmp_path, {"num_frames": 6, "height": 48, "width": 48, "fps": 12}) as writer:
        writer.add(0, {"prompt": "a cat"}, {"latents": latents})
    config = DataConfig(kind=DataKind.videos, path=str(tmp_path))
    clips = training_data(config, Contents.clips, seed=0, video=VIDEO, codec=codec).next(1)
    assert torch.equal(clips.encode(codec, torch.device("cpu")), latents.float()[None])
    first = training_data(config, Contents.first_frames, seed=0, video=VIDEO, codec=codec).next(1)
    assert torch.equal(first.latents, latents.float()[None, :1]) and training_prompts(config, VIDEO) == ["a cat"]
    for video, message in (
        (VideoConfig(height=48, width=96, num_frames=6), "have width 48, but video.width=96"),
        (VideoConfig(height=48, width=48, num_frames=9), "have 6 latent frames; 9 are needed"),
    ):
        with pytest.raises(UserError, match=message):
            training_data(config, Contents.clips, seed=0, video=video, codec=codec)


def test_missing_data_is_named(tmp_path, codec):
    options = {"seed": 0, "video": VIDEO, "codec": codec}
    with pytest.raises(UserError, match=r"data\.path is null; name what data\.kind=prompts reads"):
        training_data(DataConfig(), Contents.prompts, **options)
    with pytest.raises(UserError, match="no such prompt file"):
        training_data(DataConfig(path=str(tmp_path / "nowhere.txt")), Contents.prompts, **options)
    with pytest.raises(UserError, match=r"data\.kind=prompts has no videos to train on; use .*shapes or videos"):
        training_data(DataConfig(), Contents.clips, **options)
    with pytest.raises(UserError, match=r"data\.path=.*holds no items; encode a folder of videos"):
        training_data(DataConfig(kind=DataKind.videos, path=str(tmp_path)), Contents.clips, **options)
    with pytest.raises(UserError, match=r"ode\.pairs=.*holds no items; make pairs with scripts/make_ode_pairs"):
        ODEData(tmp_path)
    with pytest.raises(UserError, match=r"data\.embeddings=.*holds no items; fill it with scripts/cache_embed"):
        StoredEmbeddings(tmp_path)


def test_stored_embeddings_are_padded_again_and_a_missing_prompt_is_named(tmp_path):
    stored = torch.randn(3, 8).bfloat16()
    with ShardWriter(tmp_path, {"dim": 8, "text_len": 5}) as writer:
        writer.add(0, {"prompt": "a cat"}, {"embeds": stored})
        writer.add(1, {"prompt": ""}, {"embeds": stored[:1]})
    embeddings = StoredEmbeddings(tmp_path)
    encoded = embeddings.encode(["", "a cat"])
    assert encoded.shape == (2, embeddings.text_len, embeddings.dim)
    assert torch.equal(encoded[1, :3], stored.float()) and not encoded[1, 3:].any() and not encoded[0, 1:].any()
    with pytest.raises(UserError, match=r"holds no embedding of 'a dog'; fill it with scripts/cache_embeddings\.py"):
        embeddings.encode(["a dog"])


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ({"dim": 8, "text_len": 2**40}, "text_len = 1099511627776"),
        ({"dim": -1, "text_len": 8}, "dim = -1"),
        ({"dim": "8x", "text_len": 8}, "dim = '8x'"),
        ({"text_len": 8}, "dim"),
    ],
)
def test_sizes_that_cannot_be_right_are_refused_before_anything_is_allocated(tmp_path, about, text):
    with ShardWriter(tmp_path, about) as writer:
        writer.add(0, {"prompt": "a cat"}, {"embeds": torch.zeros(4, 8)})
    with pytest.raises(UserError, match=text):
        StoredEmbeddings(tmp_path)


def test_embeddings_of_another_size_are_one_line(tmp_path):
    with ShardWriter(tmp_path, {"dim": 8, "text_len": 16}) as writer:
        writer.add(0, {"prompt": "a cat"}, {"embeds": torch.zeros(4, 9)})
    with pytest.raises(UserError, match=r"embeds has the shape \[4, 9\], not \[4, 8\]"):
        StoredEmbeddings(tmp_path).encode(["a cat"])
