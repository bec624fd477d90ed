"""A session makes the video of its request, obeys commands within one step, and leaves no thread or memory behind."""

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.layer_cache import KeyLayout
from pipeline.generation import generate
from pipeline.request import PromptSwitch, StreamRequest
from pipeline.rollout import Pass
from pipeline.session import StreamSession, denoise_together
from pipeline.states import SessionState, Stopped, SwitchStyle
from pipeline.stream import Stream
from pipeline.text_to_video import TextToVideo, load_pipeline
from pipeline.workspace import Workspace
from tests.parity import relative_error
from trainer.config import Config
from utils.config import load_config
from utils.frames import to_uint8
from utils.shapes import Scene, all_scenes, measure, render_clips

pytest_plugins = ["tests.shapes_parts"]

RED, BLUE = "a large red circle", "a small blue square"
STEP_SECONDS = 0.05
PATIENCE = 20.0  # seconds; on a quiet machine these waits end at once
BEGUN = 1  # one step may have begun before the command
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pipeline(release) -> TextToVideo:
    return load_pipeline(release.config(), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def slow(pipeline, monkeypatch) -> list[list[float]]:
    """Make every pass take at least STEP_SECONDS. Give the times at which each pass began and ended."""
    passes: list[list[float]] = []
    forward = pipeline.denoiser.forward

    def wait(*args, **kwargs):
        times = [time.monotonic()]
        passes.append(times)
        time.sleep(STEP_SECONDS)
        made = forward(*args, **kwargs)
        times.append(time.monotonic())
        return made

    monkeypatch.setattr(pipeline.denoiser, "forward", wait)
    return passes


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def request(**options) -> StreamRequest:
    return StreamRequest(**{"prompt": RED, "height": 48, "width": 48, "num_frames": 9} | options)


def frames_of(chunks) -> torch.Tensor:
    return torch.cat([chunk.frames for chunk in chunks])


def in_thread(function) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_a_session_makes_the_video_of_generate(pipeline):
    session = StreamSession(pipeline, request(seed=3, sample=1))
    chunks = list(session)
    whole = generate(pipeline, [request(seed=3, sample=1)])[0]
    assert torch.equal(frames_of(chunks), to_uint8(whole))
    assert [(chunk.index, chunk.start_frame, len(chunk.frames)) for chunk in chunks] == [
        (0, 0, 9),
        (1, 3, 12),
        (2, 6, 12),
    ]
    assert session.state is SessionState.finished and session.denoise() is None
    for chunk in chunks:
        assert chunk.timings.keys() == {"denoise", "decode", "context" if chunk.index else "text"}
        assert min(chunk.timings.values()) > 0


def test_a_request_restarted_is_the_same_video_and_another_one_is_not_mixed_with_it(pipeline):
    session = StreamSession(pipeline, request())
    first = [session.decode(session.denoise()) for _ in range(2)]
    late = session.denoise()
    session.restart()
    with pytest.raises(Stopped):
        session.decode(late)
    assert torch.equal(frames_of(session)[:21], frames_of(first))
    session.restart(request(prompt=BLUE))
    assert (session.state, session.prompt) == (SessionState.running, BLUE)
    blue = frames_of(session)
    assert torch.equal(blue, frames_of(StreamSession(pipeline, request(prompt=BLUE))))
    with pytest.raises(ValueError, match="20x48"):
        session.restart(request(height=20))
    assert session.prompt == BLUE


def test_steps_are_the_requests_own(pipeline):
    passes = []
    hook = pipeline.denoiser.register_forward_pre_hook(lambda _, args: passes.append(args[1][0, 0].item()))
    with hook:
        list(StreamSession(pipeline, request(num_frames=3, denoising_steps=[1000.0, 250.0])))
    assert passes == pipeline.denoiser.schedule.warp([1000.0, 250.0])


def test_pause_holds_within_a_step_and_resume_goes_on_to_the_same_video(pipeline, slow):
    session = StreamSession(pipeline, request())
    chunks = []
    thread = in_thread(lambda: chunks.extend(session))
    while len(slow) < 2:
        time.sleep(0.001)
    session.pause()
    passes = len(slow)
    time.sleep(3 * STEP_SECONDS)
    assert len(slow) <= passes + BEGUN and session.state is SessionState.paused
    assert session.denoise(wait=False) is None
    session.resume()
    thread.join()
    assert len(slow) == 3 * 4 + 2
    slow.clear()
    assert torch.equal(frames_of(chunks), frames_of(StreamSession(pipeline, request())))


def test_a_paused_chunk_goes_on_at_the_step_it_was_at(pipeline):
    session, seen, blocks = StreamSession(pipeline, request()), [], []

    def pause_after_each(*_):
        seen.append(1)
        session.pause()

    with pipeline.denoiser.register_forward_hook(pause_after_each):
        block = session.denoise(wait=False)
        while session.state is not SessionState.finished:
            blocks += [] if block is None else [block]
            session.resume()
            block = session.denoise(wait=False)
    assert len(seen) == 3 * 4 + 2
    unhurried = StreamSession(pipeline, request())
    for block in blocks:
        assert torch.equal(block.latents, unhurried.denoise().latents)


@pytest.mark.parametrize("paused", [False, True])
def test_stop_takes_effect_within_one_step(pipeline, slow, paused):
    session, ended = StreamSession(pipeline, request(num_frames=None)), []
    thread = in_thread(lambda: ended.append(session.denoise()))
    while len(slow) < 2:
        time.sleep(0.001)
    if paused:
        session.pause()
    session.stop()
    passes = len(slow)
    thread.join()
    assert ended == [None] and session.state is SessionState.stopped
    assert len(slow) <= passes + BEGUN
    assert session.denoise() is None


@pytest.mark.parametrize("busy", [False, True], ids=["between two chunks", "inside a step"])
def test_a_stopped_stream_is_freed_without_a_garbage_collection(pipeline, slow, busy):
    session = StreamSession(pipeline, request(num_frames=None))
    session.denoise()
    freed = weakref.ref(session._stream)
    gc.collect()
    gc.disable()
    try:
        passes = len(slow)
        thread = in_thread(session.denoise) if busy else None
        while busy and len(slow) == passes:
            time.sleep(0.001)
        session.stop()
        if thread is not None:
            thread.join()
        assert freed() is None
    finally:
        gc.enable()


def test_leaving_the_loop_stops_everything_within_a_step(pipeline, slow, monkeypatch):
    session, passes = StreamSession(pipeline, request(num_frames=None)), []
    stop = session.stop
    monkeypatch.setattr(session, "stop", lambda: (stop(), passes.append(len(slow))))
    for _ in session:
        break
    assert session.state is SessionState.stopped
    assert len(slow) <= passes[0] + BEGUN


def test_a_slow_viewer_holds_the_generator_up(pipeline):
    session, passes = StreamSession(pipeline, request(num_frames=None)), []
    with pipeline.denoiser.register_forward_hook(lambda *_: passes.append(1)):
        for shown, _ in zip(range(1, 6), session, strict=False):
            made = len(passes)
            time.sleep(0.05)
            assert len(passes) == made <= 5 * (shown + 1)  # the next chunk at most


def test_decoding_overlaps_denoising_once_the_first_chunk_is_out(pipeline, slow, monkeypatch):
    session, overlapped = StreamSession(pipeline, request(num_frames=12)), []
    decode = session.decode

    def slow_decode(block, show=None):
        begun, alone = len(slow), block.index in (0, 3)
        deadline = time.monotonic() + (2 * STEP_SECONDS if alone else PATIENCE)
        while len(slow) == begun and time.monotonic() < deadline:
            time.sleep(STEP_SECONDS / 10)
        overlapped.append(len(slow) > begun)
        return decode(block, show)

    monkeypatch.setattr(session, "decode", slow_decode)
    list(session)
    assert overlapped == [False, True, True, False]


def test_a_failing_step_is_raised_where_chunks_are_taken_and_stops_the_session(pipeline, monkeypatch):
    session = StreamSession(pipeline, request())
    chunks = iter(session)
    next(chunks)
    monkeypatch.setattr(pipeline.denoiser, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(chunks)
    assert session.state is SessionState.stopped


@pytest.mark.parametrize("style", SwitchStyle)
def test_a_switch_takes_effect_with_the_next_chunk(pipeline, style):
    session = StreamSession(pipeline, request(num_frames=12))
    plain = list(StreamSession(pipeline, request(num_frames=12)))
    chunks = [session.decode(session.denoise())]
    session.switch(RED, style)
    session.switch(BLUE, style, blend_chunks=1)
    assert session.prompt == BLUE
    while (block := session.denoise()) is not None:
        chunks.append(session.decode(block))
    assert [chunk.prompt for chunk in chunks] == [RED, BLUE, BLUE, BLUE]
    assert torch.equal(chunks[0].frames, plain[0].frames)
    assert (chunks[1].frames[:9].float() - plain[1].frames[:9].float()).abs().mean() > 0.1
    assert len(chunks[1].frames) == (9 if style is SwitchStyle.cut else 12)
    assert "text" in chunks[1].timings and "text" not in chunks[2].timings


def test_blend_moves_the_embeddings_evenly_over_its_chunks(pipeline):
    told = []
    with pipeline.denoiser.register_forward_pre_hook(lambda _, args: told.append(args[2])):
        list(
            StreamSession(
                pipeline, request(num_frames=12, switches=(PromptSwitch(BLUE, SwitchStyle.blend, 2, at_frame=9),))
            )
        )
    red, blue = pipeline.text_encoder.encode([RED]), pipeline.text_encoder.encode([BLUE])
    expected = [red] * 5 + [(red + blue) / 2] * 5 + [blue] * 9
    assert len(told) == len(expected)
    for embeds, wanted in zip(told, expected, strict=True):
        assert (embeds - wanted).abs().max() < 1e-6


def test_scheduled_switches_begin_at_the_first_chunk_at_their_frame(pipeline):
    cues = [PromptSwitch(BLUE, SwitchStyle.cut, at_frame=10), PromptSwitch("a cat", SwitchStyle.keep, at_frame=30)]
    chunks = list(StreamSession(pipeline, request(num_frames=15, switches=tuple(cues))))
    starts = list(itertools.accumulate((len(chunk.frames) for chunk in chunks), initial=0))
    assert list(zip(starts, [chunk.prompt for chunk in chunks], strict=False)) == [
        (0, RED), (9, RED), (21, BLUE), (30, "a cat"), (42, "a cat"),
    ]  # fmt: skip
    session = StreamSession(pipeline, request(num_frames=15))
    live = []
    while (block := session.denoise()) is not None:
        live.append(session.decode(block))
        if block.index in (1, 2):
            session.switch(cues[block.index - 1].prompt, cues[block.index - 1].style)
    assert torch.equal(frames_of(live), frames_of(chunks))


def test_a_stream_goes_on_from_given_frames(pipeline):
    clip = frames_of(StreamSession(pipeline, request()))
    given = clip[-5:].permute(0, 3, 1, 2) / 127.5 - 1
    chunks = list(StreamSession(pipeline, request(num_frames=8, context_frames=given)))
    assert [(chunk.start_frame, len(chunk.frames)) for chunk in chunks] == [(0, 5), (2, 12), (5, 12)]
    with torch.no_grad():
        decoded = to_uint8(pipeline.codec.decode(pipeline.codec.encode(given[None]))[0])
    assert (chunks[0].frames.int() - decoded.int()).abs().max() <= 1
    whole = generate(pipeline, [request(num_frames=8, context_frames=given)])[0]
    assert torch.equal(frames_of(chunks), to_uint8(whole))


def test_sessions_together_make_what_each_makes_alone(pipeline):
    """Also where one cuts or recaches on the way, has other steps, or a last frame earlier than the others."""
    requests = [
        request(num_frames=12, switches=(PromptSwitch(BLUE, style, 2, at_frame=10),), seed=seed)
        for seed, style in enumerate(SwitchStyle)
    ]
    requests += [request(num_frames=6), request(width=64), request(denoising_steps=[1000.0, 500.0])]
    sessions = [StreamSession(pipeline, one) for one in requests]
    made: list[list[torch.Tensor]] = [[] for _ in requests]
    batches = []
    with pipeline.denoiser.register_forward_pre_hook(lambda _, args: batches.append(len(args[0]))):
        while any(session.state is SessionState.running for session in sessions):
            for blocks, block in zip(made, denoise_together(sessions), strict=True):
                blocks += [] if block is None else [block.latents]
    for one, blocks in zip(requests, made, strict=True):
        alone, session = [], StreamSession(pipeline, one)
        while (block := session.denoise()) is not None:
            alone.append(block.latents)
        assert relative_error(torch.cat(blocks, dim=1), torch.cat(alone, dim=1)) <= 1e-5
    assert max(batches) == 6 and sum(batches) == 4 * (4 * 4 + 3) - 1 + (4 * 2 + 1) + (4 * 3 + 2) + (2 * 3 + 2)


def test_sessions_of_any_age_share_a_batch_once_their_windows_are_full(pipeline):
    prompts = [RED, BLUE, " ".join(["a large purple triangle moving up and left on a gray background"] * 3)]
    alone = []
    for prompt in prompts:
        session = StreamSession(pipeline, request(prompt=prompt, num_frames=None))
        alone.append([session.denoise().latents for _ in range(6)])
    sessions = [StreamSession(pipeline, request(prompt=prompt, num_frames=None)) for prompt in prompts]
    for age, session in enumerate(sessions, start=2):
        for index in range(age):
            assert torch.equal(session.denoise().latents, alone[age - 2][index])
    batches = []
    with pipeline.denoiser.register_forward_pre_hook(lambda _, args: batches.append(len(args[0]))):
        for turn in range(2):
            for age, block in enumerate(denoise_together(sessions), start=2):
                assert relative_error(block.latents, alone[age - 2][age + turn]) <= 1e-5
    assert batches == [3] * 2 * 5


def test_the_first_frames_are_there_before_the_rest_of_their_chunk_is_decoded(pipeline):
    """The first chunk is decoded latent by latent, later chunks at once. The frames equal those of a whole clip."""
    made, session = [], StreamSession(pipeline, request(switches=(PromptSwitch(BLUE, SwitchStyle.cut, at_frame=15),)))
    latents, decoder = [], session._stream.decoder
    decode = decoder.decode
    decoder.decode = lambda part: latents.append(part) or decode(part)
    chunks = list(session.chunks(lambda frames: made.append((len(latents), frames))))
    assert [(decoded, len(frames)) for decoded, frames in made] == [
        (1, 1), (2, 4), (3, 4), (4, 12), (5, 1), (6, 4), (7, 4),
    ]  # fmt: skip
    assert torch.equal(torch.cat([frames for _, frames in made]), frames_of(chunks))
    with torch.no_grad():
        whole = to_uint8(pipeline.codec.decode(torch.cat(latents[:4], dim=1))[0])
    assert (frames_of(chunks)[:21].int() - whole.int()).abs().max() <= 1  # a level, where a pixel is between two


def test_a_failing_source_stops_its_own_session(pipeline):
    def broken():
        yield source_clip(9)
        raise OSError("camera unplugged")

    session, other = StreamSession(pipeline, request(source=broken())), StreamSession(pipeline, request())
    assert None not in denoise_together([session, other])
    with pytest.raises(OSError, match="camera"):
        denoise_together([session, other])
    assert (session.state, other.state) == (SessionState.stopped, SessionState.running)
    assert denoise_together([session, other])[1].index == 1


@pytest.fixture
def shipped(monkeypatch) -> TextToVideo:
    monkeypatch.chdir(REPOSITORY)
    config = load_config(Config, "configs/shapes/self_forcing_dmd.yaml")
    return load_pipeline(config, device=torch.device("cpu"), dtype=torch.float32)


def source_clip(frames: int) -> torch.Tensor:
    return torch.rand(frames, 3, 48, 48, generator=torch.Generator().manual_seed(5)) * 2 - 1


def test_video_to_video_follows_its_source_the_closer_the_lower_its_strength(shipped):
    (source,) = render_clips([all_scenes()[40]], 33, torch.Generator().manual_seed(5))
    made = {
        strength: list(StreamSession(shipped, request(num_frames=None, source=source.split(7), strength=strength)))
        for strength in (0.25, 0.75, 1.0)
    }
    assert [len(chunk.frames) for chunk in made[0.25]] == [9, 12, 12]
    far = {strength: (frames_of(chunks).float() - to_uint8(source)).abs().mean() for strength, chunks in made.items()}
    assert far[0.25] < far[0.75] < far[1.0]
    assert torch.equal(frames_of(made[1.0]), frames_of(StreamSession(shipped, request())))
    assert {"source", "denoise"} <= made[0.25][1].timings.keys()


def test_a_source_may_come_late_in_any_pieces_and_end_in_the_middle_of_a_chunk(pipeline):
    source = source_clip(25)
    pieces = [source[:4], None, None, source[4:10], None, source[10:]]
    session = StreamSession(pipeline, request(num_frames=None, source=iter(pieces)))
    waits = 0
    while (block := session.denoise(wait=False)) is None:
        waits += 1
    assert (waits, session.state) == (2, SessionState.running)
    made = frames_of([session.decode(block), *session])
    filled = torch.cat([source, source[-1:].expand(8, -1, -1, -1)])
    assert torch.equal(made, frames_of(StreamSession(pipeline, request(source=[filled]))))


def test_a_source_is_encoded_in_chunks_as_in_one_piece(pipeline, monkeypatch):
    """This uses the Shapes codec, whose encoder depends on one earlier latent only."""
    source, given = source_clip(33), []
    monkeypatch.setattr("pipeline.stream.add_noise", lambda latents, noise, timesteps: given.append(latents) or noise)
    list(StreamSession(pipeline, request(source=source.split(4))))
    with torch.no_grad():
        assert (torch.cat(given, dim=1) - pipeline.codec.encode(source[None])).abs().max() < 1e-5


@pytest.fixture(params=["many_step", "causal_many_step"])
def teacher(release, request) -> TextToVideo:
    config = release.config(f"sampler={request.param}", "sampling.steps=10")
    return load_pipeline(config, device=torch.device("cpu"), dtype=torch.float32)


def test_many_step_samplers_stop_within_a_pass_too(teacher, monkeypatch):
    session, passes = StreamSession(teacher, request()), []
    forward = teacher.denoiser.forward

    def stop_at_the_third(*args, **options):
        passes.append(1)
        if len(passes) == 3:
            session.stop()
        return forward(*args, **options)

    monkeypatch.setattr(teacher.denoiser, "forward", stop_at_the_third)
    assert list(session) == [] and len(passes) == 3


def test_many_step_samplers_refuse_what_they_cannot_do(teacher):
    for options in (
        {"switches": (PromptSwitch(BLUE),)},
        {"source": [source_clip(9)]},
        {"denoising_steps": [1000.0]},
        {"num_frames": None},
    ):
        with pytest.raises(ValueError, match="sampler"):
            StreamSession(teacher, request(**options))


def test_a_thrifty_pipeline_decodes_when_all_latents_are_there(pipeline, monkeypatch):
    made = frames_of(StreamSession(pipeline, request()))
    session, order = StreamSession(replace(pipeline, decode_last=True), request()), []
    decode = session.decode
    monkeypatch.setattr(session, "decode", lambda *args, **options: order.append("decode") or decode(*args, **options))
    with pipeline.denoiser.register_forward_hook(lambda *_: order.append("denoise")):
        assert torch.equal(frames_of(session), made)
    assert order == ["denoise"] * 14 + ["decode"] * 3


def resident_bytes() -> int:
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("memory is read from /proc, which is not here")
    return int(status.read_text().split()[1]) * 4096


def test_1000_chunks_take_the_time_and_memory_of_200(pipeline):
    session = StreamSession(pipeline, request(height=16, width=16, num_frames=None, denoising_steps=[1000.0]))
    seconds, memory = [], []
    for index in range(1000):
        began = time.thread_time()
        session.decode(session.denoise())
        seconds.append(time.thread_time() - began)
        if index in (300, 999):
            memory.append(resident_bytes())
    early, late = (sorted(part)[10] for part in (seconds[100:200], seconds[-100:]))  # without what the machine adds
    growth = memory[1] / memory[0] - 1
    print(f"{early * 1e3:.2f} ms a chunk in 100-200, {late * 1e3:.2f} ms in the last 100; memory grew by {growth:.2%}")
    assert late < 1.25 * early  # on a quiet machine within 5 %
    assert growth < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 7}, "num_frames=7 is not a multiple of frames_per_chunk=3"),
        ({"width": 20}, "48x20 pixels do not divide"),
        ({"strength": 0.0}, "strength=0.0 must be above 0"),
        ({"num_frames": 0}, "num_frames=0 must be at least 1"),
        ({"denoising_steps": [250.0, 500.0]}, "must descend"),
        ({"context_frames": torch.zeros(5, 3, 48, 48), "num_frames": 4}, "num_frames=2 is not a multiple"),
        ({"switches": (PromptSwitch("a", at_frame=5), PromptSwitch("b", at_frame=4))}, "not in ascending order"),
    ],
)
def test_a_wrong_request_is_refused_at_once(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        StreamSession(pipeline, request(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 64}, "may differ in prompt, seed, sample and given frames alone"),
        ({"num_frames": 12}, "may differ in prompt"),
        ({"context_frames": torch.zeros(1, 3, 48, 48)}, "may differ in prompt"),
        ({"source": []}, "cannot be made as a batch"),
    ],
)
def test_requests_that_make_no_batch_are_refused(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        Stream(pipeline, request(), request(**options))


@pytest.mark.gpu
def test_on_cuda_frames_come_through_pinned_memory_beside_the_denoising(release):
    cuda = load_pipeline(release.config(), device=torch.device("cuda"), dtype=torch.float32)
    chunks = list(StreamSession(cuda, request()))
    whole = generate(cuda, [request()])[0]
    assert (frames_of(chunks).int() - to_uint8(whole).int()).abs().max() <= 1
    for chunk in chunks:
        assert chunk.frames.is_pinned() and min(chunk.timings.values()) > 0


@pytest.mark.parametrize(
    "options", [{"prompt": " "}, {"prompt": "a", "blend_chunks": 0}, {"prompt": "a", "at_frame": -1}]
)
def test_a_wrong_switch_is_refused_at_once(options):
    with pytest.raises(ValueError, match=r"empty|blend_chunks=0|at_frame=-1"):
        PromptSwitch(**options)


def sees(frames: torch.Tensor, scene: Scene) -> bool:
    """Return whether the last frames of a chunk show the scene's object."""
    shown = measure(frames[-4:].permute(0, 3, 1, 2) / 127.5 - 1, scene)
    return (shown.shape & shown.colour).float().mean().item() >= 0.75


def test_the_shipped_model_shows_the_new_object_within_two_chunks_of_a_switch(shipped):
    scenes, generator = all_scenes(), torch.Generator().manual_seed(0)
    chosen = [scenes[index] for index in torch.randperm(len(scenes), generator=generator)[:16]]
    seen = 0
    for before, after in zip(chosen[::2], chosen[1::2], strict=True):
        switch = PromptSwitch(after.prompt, SwitchStyle.recache, at_frame=21)
        session = StreamSession(shipped, request(prompt=before.prompt, num_frames=12, switches=(switch,)))
        seen += any(sees(chunk.frames, after) for chunk in list(session)[2:])
    print(f"recache: {seen} of 8 new objects seen")
    assert seen >= 6


def test_passes_of_several_sessions_never_pile_up(pipeline, monkeypatch):
    """After each round the sessions wait until only the newest work is queued, so that a stop takes effect soon."""
    waits = []
    monkeypatch.setattr("utils.timer.Stopwatch.throttle", lambda timer: waits.append(timer))
    sessions = [StreamSession(pipeline, request(prompt=prompt)) for prompt in (RED, BLUE)]
    passes = []
    hook = pipeline.denoiser.register_forward_pre_hook(lambda *_: passes.append(1))
    denoise_together(sessions)
    hook.remove()
    assert len(waits) == len(passes) > 1


def test_all_sessions_decode_in_one_stream_of_the_device(pipeline, monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    device, other = torch.device("cpu"), replace(pipeline)
    shared = replace(pipeline, workspace=Workspace())
    other = replace(shared, decode_last=True)
    assert shared.workspace.decoding_stream(device) is other.workspace.decoding_stream(device) and made == [device]


def test_one_set_of_key_buffers_serves_one_session_after_another(pipeline, monkeypatch):
    """No chunk after the first allocates any, a switch does not, and the next session does not. Frames are the same."""
    switches = tuple(PromptSwitch(BLUE, style, 1, at_frame=9 + 12 * i) for i, style in enumerate(SwitchStyle))
    asked = request(num_frames=15, switches=switches)
    expected = frames_of(StreamSession(replace(pipeline, decode_last=True), asked))
    shared, made, zeros = replace(pipeline, workspace=Workspace()), [], KeyLayout.zeros
    monkeypatch.setattr(KeyLayout, "zeros", lambda *args, **options: made.append(1) or zeros(*args, **options))
    counts = []
    for _ in range(2):
        assert torch.equal(frames_of(StreamSession(shared, asked)), expected)
        counts.append(len(made))
    assert counts[0] == counts[1] == 2 * shared.denoiser.transformer.config.num_layers
    first, second = StreamSession(shared, asked), StreamSession(shared, asked)
    chunks = [session.denoise() for session in (first, second, first, second)]
    assert len(made) == 2 * counts[0]  # sessions at the same time have buffers each
    assert torch.equal(chunks[0].latents, chunks[1].latents) and torch.equal(chunks[2].latents, chunks[3].latents)


def test_a_pass_that_still_runs_keeps_its_buffers_from_the_next_session(pipeline):
    shared = replace(pipeline, workspace=Workspace())

    def begin() -> tuple[Stream, Pass, torch.Tensor]:
        stream = Stream(shared, request())
        stream.step()
        running = stream.pending
        running.run(shared.denoiser)
        return stream, running, running.cache.layers[0].k.data

    stopped, running, keys = begin()
    stopped.close()
    del stopped
    assert begin()[2] is not keys
    del running
    assert begin()[2] is keys
