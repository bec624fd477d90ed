"""A video depends only on its prompt, seed and settings. It is made chunk by chunk."""

import itertools

import pytest
import torch

from pipeline.generation import generate, stream_frames
from pipeline.request import StreamRequest
from pipeline.sampling import sample
from pipeline.text_to_video import TextToVideo, load_pipeline
from tests.shapes_parts import CODEC

pytest_plugins = ["tests.shapes_parts"]

PROMPTS = [("a red circle", 0), ("a large blue square moving up on a black background", 0), ("", 7)]
SIZE = {"height": 48, "width": 48, "num_frames": 6}


def requests(count: int = 3, **options) -> list[StreamRequest]:
    return [StreamRequest(prompt, seed=seed, **SIZE | options) for prompt, seed in PROMPTS[:count]]


@pytest.fixture(scope="module")
def pipeline(release) -> TextToVideo:
    return load_pipeline(release.config(), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def calls(pipeline, monkeypatch) -> list[int]:
    """Give a list that receives the start frame of each pass of the denoiser."""
    starts = []
    forward = pipeline.denoiser.forward

    def count(*args, start_frame: int, **kwargs):
        starts.append(start_frame)
        return forward(*args, start_frame=start_frame, **kwargs)

    monkeypatch.setattr(pipeline.denoiser, "forward", count)
    return starts


def test_a_video_is_the_same_alone_and_in_any_batch(pipeline):
    together = generate(pipeline, requests())
    assert together.shape == (3, 21, 3, 48, 48) and together.dtype == torch.float32
    assert together.min() >= -1 and together.max() <= 1
    reordered = generate(pipeline, requests()[::-1]).flip(0)
    assert (reordered - together).abs().max() <= 1e-4
    for index, request in enumerate(requests()):
        assert (generate(pipeline, [request])[0] - together[index]).abs().max() <= 1e-4


def test_prompt_seed_and_sample_each_change_a_video(pipeline):
    different = [("a cat", 0, 0), ("a red circle", 0, 0), ("a cat", 1, 0), ("a cat", 0, 1)]
    clips = generate(
        pipeline, [StreamRequest(prompt, seed=seed, sample=sample, **SIZE) for prompt, seed, sample in different]
    )
    for first, second in itertools.combinations(clips, 2):
        assert (first - second).abs().mean() > 0.01


def test_a_prompt_shows_beyond_the_noise_it_seeds(pipeline):
    """The same noise with two prompts gives two videos, so the text reaches the transformer."""
    same_noise = [requests()[0].generator("noise") for _ in range(2)]
    noise = torch.cat([torch.randn(1, 3, CODEC.latent_channels, 12, 12, generator=one) for one in same_noise])
    embeds = pipeline.text_encoder.encode(["a red circle", "a blue square"])
    with torch.no_grad():
        first, second = pipeline.denoiser(noise, torch.full((2, 3), 900.0), embeds).x0
    assert (first - second).abs().mean() > 1e-3


def test_a_longer_video_begins_with_the_shorter_one(pipeline):
    short = generate(pipeline, requests(1))
    long = generate(pipeline, requests(1, num_frames=12))
    assert long.shape[1] == 45
    assert (long[:, :21] - short).abs().max() <= 1e-4


def test_generate_joins_the_stream(pipeline):
    chunks = list(stream_frames(pipeline, requests(1)))
    assert [chunk.shape[1] for chunk in chunks] == [9, 12]
    assert torch.equal(torch.cat(chunks, dim=1), generate(pipeline, requests(1)))


def test_the_first_chunk_comes_before_the_rest_is_computed(pipeline, calls):
    stream = stream_frames(pipeline, requests(1))
    assert calls == []
    next(stream)
    assert calls == [0] * 4
    assert len(list(stream)) == 1
    assert calls == [0] * 4 + [0] + [3] * 4


def test_an_endless_stream_goes_on_past_its_window_and_begins_like_a_finite_one(pipeline):
    chunks = list(itertools.islice(stream_frames(pipeline, requests(1, num_frames=None)), 6))
    assert [chunk.shape[1] for chunk in chunks] == [9, 12, 12, 12, 12, 12]
    assert torch.cat(chunks, dim=1).isfinite().all()
    finite = generate(pipeline, requests(1))
    assert (torch.cat(chunks[:2], dim=1) - finite).abs().max() <= 1e-4


@pytest.mark.parametrize("enabled", [True, False])
def test_the_callers_grad_mode_is_left_alone(pipeline, enabled):
    with torch.set_grad_enabled(enabled):
        for chunk in stream_frames(pipeline, requests(1)):
            assert torch.is_grad_enabled() is enabled
            assert not chunk.requires_grad
        assert torch.is_grad_enabled() is enabled


def test_given_frames_come_first_and_change_what_follows(pipeline):
    context = torch.zeros(1, 1, 3, 48, 48)
    context[:, :, 0] = 1
    red, black = (
        generate(pipeline, requests(1, num_frames=4, context_frames=frames[0])) for frames in (context, context * 0)
    )
    with torch.no_grad():
        decoded = pipeline.codec.decode(pipeline.codec.encode(context))
    assert red.shape[1] == 13
    assert (red[:, :1] - decoded).abs().max() <= 1e-5
    assert (red[:, 1:] - black[:, 1:]).abs().mean() > 0.01


def test_the_many_step_sampler_makes_what_guided_sampling_makes(release):
    """Whole clips are equal however they are decoded, also if their length is not a multiple of a chunk."""
    config = release.config(f"generator.weights={release.folder / 'teacher'}", "sampler=many_step", "sampling.steps=3")
    pipeline = load_pipeline(config, device=torch.device("cpu"), dtype=torch.float32)
    clips = generate(pipeline, requests(2, num_frames=5))
    noise = torch.cat(
        [torch.randn(1, 5, CODEC.latent_channels, 12, 12, generator=one.generator("noise")) for one in requests(2)]
    )
    embeds, negative = (
        pipeline.text_encoder.encode(texts) for texts in ([one.prompt for one in requests(2)], [""] * 2)
    )
    with torch.no_grad():
        expected = pipeline.codec.decode(sample(pipeline.denoiser, noise, embeds, negative, config.sampling))
    assert clips.shape[1] == 17
    assert (clips - expected).abs().max() <= 1e-4
    with pytest.raises(ValueError, match="many_step"):
        next(stream_frames(pipeline, requests(1, num_frames=None)))


def test_sizes_and_lengths_that_do_not_divide_are_refused(pipeline):
    with pytest.raises(ValueError, match="20x48 pixels do not divide into tokens of 8x8"):
        generate(pipeline, requests(1, height=20))
    with pytest.raises(ValueError, match="num_frames=7 is not a multiple of frames_per_chunk=3"):
        generate(pipeline, requests(1, num_frames=7))


def test_a_clip_of_another_size_follows_without_a_trace_of_the_last(pipeline):
    wide = {"width": 64, "num_frames": 3}
    first = generate(pipeline, requests(1, **wide))
    generate(pipeline, requests())
    assert first.shape == (1, 9, 3, 48, 64)
    assert torch.equal(generate(pipeline, requests(1, **wide)), first)
