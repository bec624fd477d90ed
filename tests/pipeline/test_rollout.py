"""The cached rollout equals the masked one. Its gradients are those of the last pass of each chunk."""

from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor

from model.attention import BlockMask, chunk_ranges
from model.flow_matching import add_noise
from model.kv_cache import KVCache
from model.layer_cache import CacheDtype, KeyLayout, LayerCache
from model.rope import rotary_table
from pipeline.rollout import (
    ChunkInput,
    FinishedChunk,
    RolloutConfig,
    Stage,
    SwitchStyle,
    randn,
    rollout,
    rollout_passes,
)
from pipeline.steps import GradientSteps
from tests.parity import gradients, random, relative_error, tiny_denoiser
from utils.config import from_dict, load_config, to_dict

STEPS = [1000.0, 500.0]
EMBEDS = random(1, 5, 8, seed=1)
OTHER = random(1, 5, 8, seed=2)


def clip(frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    return random(batch, frames, 4, 4, 6, seed=seed)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(**options) -> RolloutConfig:
    return RolloutConfig(**{"denoising_steps": STEPS, **options})


def latents_of(blocks) -> Tensor:
    return torch.cat([block.latents for block in blocks], dim=1)


def naive_mask(chunks: list[tuple[int, int]], window: int | None = None, sink: int = 0) -> BlockMask:
    """Return a mask made frame by frame: visible frames are before the chunk's end, and in the window or the sink."""
    rows = []
    for start, end in chunks:
        oldest = 0 if window is None or end <= window else end - (window - sink)
        keys = [(frame, frame + 1) for frame in range(end) if frame >= oldest or frame < sink]
        rows.append(((start, end), tuple(keys)))
    return BlockMask(tuple(rows), tuple(range(chunks[-1][1])))


def masked_pass(denoiser, finished: list[Tensor], live: Tensor, timestep: float, mask: BlockMask) -> Tensor:
    """Return x0 of the new chunk from one pass over the clean finished frames and the chunk at its timestep."""
    sequence = torch.cat([*finished, live], dim=1)
    timesteps = torch.zeros(sequence.shape[:2])
    timesteps[:, -live.shape[1] :] = timestep
    return denoiser(sequence, timesteps, EMBEDS, block_mask=mask).x0[:, -live.shape[1] :]


def masked_rollout(
    denoiser,
    noise: Tensor,
    rules: RolloutConfig,
    chunks,
    given: Tensor | None,
    generator,
    *,
    detach_steps: bool = False,
) -> Tensor:
    """Make the reference: without a cache, each pass covers all frames so far. Chunks include the given frames."""
    finished = [] if given is None else [given]
    for index, (start, end) in enumerate(chunks):
        if given is not None and start < given.shape[1]:
            continue
        mask = naive_mask(chunks[: index + 1], rules.window, rules.sink)
        offset = 0 if given is None else given.shape[1]
        timesteps = rules.timesteps(denoiser)
        x0 = masked_pass(denoiser, finished, noise[:, start - offset : end - offset], timesteps[0], mask)
        for timestep in timesteps[1:]:
            x0 = x0.detach() if detach_steps else x0
            latents = add_noise(x0, randn(x0.shape, generator, x0), torch.full(x0.shape[:2], timestep))
            x0 = masked_pass(denoiser, finished, latents, timestep, mask)
        finished.append(x0)
    return torch.cat(finished if given is None else finished[1:], dim=1)


LAYOUTS = {
    "everything visible": (9, 0, [(0, 3), (3, 6), (6, 9)], {}),
    "window": (12, 0, [(0, 3), (3, 6), (6, 9), (9, 12)], {"window": 6}),
    "window no multiple of the chunk": (12, 0, [(0, 3), (3, 6), (6, 9), (9, 12)], {"window": 7}),
    "window and sink": (15, 0, [(0, 3), (3, 6), (6, 9), (9, 12), (12, 15)], {"window": 8, "sink": 2}),
    "window of one chunk": (9, 0, [(0, 3), (3, 6), (6, 9)], {"window": 3}),
    "frame by frame": (7, 0, [(f, f + 1) for f in range(7)], {"frames_per_chunk": 1, "window": 4, "sink": 1}),
    "first frame alone": (10, 0, [(0, 1), (1, 4), (4, 7), (7, 10)], {"independent_first_frame": True, "window": 6}),
    "one image given": (6, 1, [(0, 1), (1, 4), (4, 7)], {"independent_first_frame": True, "window": 5, "sink": 1}),
    "five frames given": (6, 5, [(0, 2), (2, 5), (5, 8), (8, 11)], {"window": 7}),
    "odd video after an image": (3, 6, [(0, 3), (3, 6), (6, 9)], {"independent_first_frame": True}),
}


@torch.no_grad()
@pytest.mark.parametrize("append_only", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cached_rollout_equals_masked_passes(layout, append_only):
    frames, context, chunks, options = LAYOUTS[layout]
    denoiser, noise, rules = tiny_denoiser(), clip(frames), config(**options)
    given = clip(context, seed=3) if context else None
    kv = KVCache(2, append_only=append_only)
    blocks = list(rollout(denoiser, noise, EMBEDS, kv, rules, context_latents=given, generator=seeded()))
    assert [block.start_frame for block in blocks] == [start for start, _ in chunks if start >= context]
    expected = masked_rollout(denoiser, noise, rules, chunks, given, seeded())
    assert relative_error(latents_of(blocks), expected) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"window": 6}, {"window": 7, "sink": 1}])
def test_committed_chunks_equal_one_masked_pass_over_the_finished_clip(options):
    denoiser, finished, kv = tiny_denoiser(), clip(12), KVCache(2, **options)
    clean = torch.zeros(1, 3)
    chunks = chunk_ranges(12, 3)
    cached = [denoiser(finished[:, a:b], clean, EMBEDS, cache=kv, start_frame=a).flow for a, b in chunks]
    whole = denoiser(finished, torch.zeros(1, 12), EMBEDS, block_mask=naive_mask(chunks, **options)).flow
    assert relative_error(torch.cat(cached, dim=1), whole) <= 1e-5


@torch.no_grad()
def test_a_cache_serves_rollouts_of_any_batch_size_resolution_window_and_prompt_in_turn():
    denoiser, kv = tiny_denoiser(), KVCache(2)
    for index, (batch, height, options) in enumerate(
        [(1, 4, {}), (2, 4, {"window": 6}), (2, 8, {"window": 4}), (1, 4, {})]
    ):
        noise, embeds = random(batch, 9, 4, height, 6, seed=index), random(batch, 5, 8, seed=index)
        used, fresh = (
            latents_of(rollout(denoiser, noise, embeds, cache, config(**options), generator=seeded()))
            for cache in (kv, KVCache(2))
        )
        assert torch.equal(used, fresh)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"context_noise": 100.0, "window": 6}])
def test_a_sample_does_not_depend_on_its_batch(options):
    denoiser, noise = tiny_denoiser(), clip(9, batch=3)
    embeds = random(3, 5, 8, seed=1)

    def run(samples):
        generators = [seeded(sample) for sample in samples]
        return latents_of(
            rollout(denoiser, noise[samples], embeds[samples], KVCache(2), config(**options), generator=generators)
        )

    together = run([0, 1, 2])
    for sample in range(3):
        assert relative_error(together[sample : sample + 1], run([sample])) <= 1e-5
    assert relative_error(run([2, 0]), together[[2, 0]]) <= 1e-5


def test_one_generator_and_a_list_of_it_draw_the_same():
    like = clip(2)
    assert torch.equal(randn(like.shape, seeded(), like), randn(like.shape, [seeded()], like))
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        randn((2, 3), [seeded()], like)


@pytest.mark.parametrize("exit_steps", [None, [0, 1, 0]])
def test_each_chunk_takes_its_steps_and_one_context_pass_but_the_last_takes_none(exit_steps):
    denoiser, passes = tiny_denoiser(), []
    denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append((kwargs["start_frame"], args[1][0, 0].item())), with_kwargs=True
    )
    list(rollout(denoiser, clip(9), EMBEDS, KVCache(2, append_only=True), config(), exit_steps=exit_steps))
    first, second = config().timesteps(denoiser)
    steps = [[first, second][: step + 1] for step in exit_steps or [1, 1, 1]]
    expected = [(3 * index, timestep) for index, chunk in enumerate(steps) for timestep in (*chunk, 0.0)]
    assert passes == expected[:-1]


@torch.no_grad()
def test_a_chunk_is_yielded_before_anything_of_the_next_is_computed():
    denoiser, passes = tiny_denoiser(), []
    denoiser.register_forward_hook(lambda *_: passes.append(1))
    blocks = rollout(denoiser, clip(9), EMBEDS, KVCache(2), config())
    assert len(passes) == 0
    next(blocks)
    assert len(passes) == 2
    next(blocks)
    assert len(passes) == 2 + 1 + 2


def test_the_callers_grad_mode_is_its_own():
    for _ in rollout(tiny_denoiser(), clip(6), EMBEDS, KVCache(2), config()):
        assert torch.is_grad_enabled()


@torch.no_grad()
def test_200_chunks_of_endless_noise_take_the_memory_of_one_window():
    denoiser, kv = tiny_denoiser(), KVCache(2)
    noise = (clip(3, seed=index) for index in count())
    rules = RolloutConfig(denoising_steps=[1000.0], window=7, sink=1)
    where, tables = set(), rotary_table.cache_info().maxsize
    for index, block in enumerate(rollout(denoiser, noise, EMBEDS, kv, rules)):
        assert block.start_frame == 3 * index and block.latents.isfinite().all()
        if index >= 3:
            live = torch.zeros(1, 3, 6, 2, 16)
            keys, _ = kv.extend(1, live, live, block.start_frame)
            where.add((keys.data_ptr(), keys.untyped_storage().nbytes()))
        if index == 200:
            break
    assert where == {(keys.data_ptr(), 7 * 6 * 32 * 4)}
    assert rotary_table.cache_info().currsize <= tables


@torch.no_grad()
def test_a_clip_of_known_length_is_allocated_once():
    denoiser, kv, live, sizes = tiny_denoiser(), KVCache(2), torch.zeros(1, 3, 6, 2, 16), set()
    for block in rollout(denoiser, clip(9), EMBEDS, kv, config()):
        keys, _ = kv.extend(1, live, live, block.start_frame)
        sizes.add(keys.untyped_storage().nbytes())
    assert sizes == {9 * 6 * 32 * 4}


@torch.no_grad()
def test_endless_noise_gives_what_the_same_noise_in_one_piece_gives():
    denoiser, noise, rules = tiny_denoiser(), clip(12), config(window=6)
    whole = latents_of(rollout(denoiser, noise, EMBEDS, KVCache(2), rules, generator=seeded()))
    pieces = latents_of(rollout(denoiser, iter(noise.split(3, 1)), EMBEDS, KVCache(2), rules, generator=seeded()))
    assert torch.equal(whole, pieces)


@torch.no_grad()
def test_a_stream_looks_the_same_a_million_frames_later():
    """If the window holds the same frames, the start frame makes no difference. No table ends."""
    denoiser, frames = tiny_denoiser(), clip(12)

    def last_of_seven_chunks(start):
        kv = KVCache(2, window=6)
        for index in range(7):
            chunk = frames.split(3, dim=1)[index % 4]
            flow = denoiser(chunk, torch.zeros(1, 3), EMBEDS, cache=kv, start_frame=start + 3 * index).flow
        return flow

    assert relative_error(last_of_seven_chunks(10**6), last_of_seven_chunks(0)) <= 1e-5


def trained(
    denoiser, noise: Tensor, rules: RolloutConfig, *, exit_step: int = 0, grad_start_frame: int | None = 0, **rest
):
    """Return the latents of a training rollout."""
    chunks = rules.chunks(noise.shape[1])
    kv, exits = KVCache(2, append_only=True), [exit_step] * len(chunks)
    blocks = rollout(
        denoiser,
        noise,
        EMBEDS,
        kv,
        rules,
        exit_steps=exits,
        grad_start_frame=grad_start_frame,
        generator=seeded(),
        **rest,
    )
    return latents_of(blocks)


RULES = {"all": {}, "window": {"window": 6}, "window and sink": {"window": 7, "sink": 1}}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("exit_step", [0, 1])
def test_checkpointing_changes_no_gradient_of_a_rollout(rules, exit_step):
    denoiser, target, taken = tiny_denoiser(), clip(12, seed=5), []
    for checkpointing in (False, True):
        denoiser.transformer.gradient_checkpointing = checkpointing
        (trained(denoiser, clip(12), config(**RULES[rules]), exit_step=exit_step) * target).sum().backward()
        taken.append(gradients(denoiser))
    assert taken[0].keys() == dict(denoiser.named_parameters()).keys()
    for name, gradient in taken[0].items():
        assert relative_error(taken[1][name], gradient) <= 1e-6, name


def detach_context(monkeypatch) -> None:
    """Let attention with a mask detach the keys and values of all frames before the last chunk."""
    from model import layers

    attention = layers.attention

    def detached(q, k, v, *, mask=None, **options):
        if mask is not None:
            context = mask.rows[-1][0][0] * 6
            k, v = (torch.cat([x[:, :context].detach(), x[:, context:]], dim=1) for x in (k, v))
        return attention(q, k, v, mask=mask, **options)

    monkeypatch.setattr(layers, "attention", detached)


@pytest.mark.parametrize("rules", RULES)
def test_rollout_gradients_are_those_of_masked_passes_with_detached_context(rules, monkeypatch):
    """The reference is one masked pass for each chunk. Every layer detaches the keys and values of earlier frames."""
    denoiser, noise, weights = tiny_denoiser(), clip(12), clip(12, seed=5)
    options = RULES[rules]
    cached = trained(denoiser, noise, config(**options))
    (cached * weights).sum().backward()
    expected = gradients(denoiser)
    detach_context(monkeypatch)
    chunks = chunk_ranges(12, 3)
    for index, (start, end) in enumerate(chunks):
        mask = naive_mask(chunks[: index + 1], **options)
        x0 = masked_pass(denoiser, [cached[:, :start].detach()], noise[:, start:end], 1000.0, mask)
        assert relative_error(x0, cached[:, start:end]) <= 1e-5
        (x0 * weights[:, start:end]).sum().backward()
    for name, gradient in gradients(denoiser).items():
        assert relative_error(gradient, expected[name]) <= 1e-4, name


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    ("steps", "detach_cache"), [("all", True), ("all", False), ("last", False)], ids=["steps", "both", "cache"]
)
def test_more_gradient_is_that_of_masked_passes(rules, steps, detach_cache, monkeypatch):
    """A loss on the last chunk alone and one on the clip, in float64, by the weights and by the noise.

    The reference has no cache: each pass covers all frames so far, and only what the option detaches is detached.
    """
    denoiser, weights = tiny_denoiser().double(), clip(12, seed=5).double()
    options = {"gradient_steps": GradientSteps(steps), "detach_cache": detach_cache}

    def losses(noise: Tensor, *, cached: bool) -> list[Tensor]:
        if cached:
            made = trained(denoiser, noise, config(**RULES[rules]), exit_step=1, **options)
        else:
            chunks = chunk_ranges(12, 3)
            made = masked_rollout(
                denoiser, noise, config(**RULES[rules]), chunks, None, seeded(), detach_steps=steps == "last"
            )
        return [(made[:, 9:] * weights[:, 9:]).sum(), (made * weights).sum()]

    def slopes(*, cached: bool) -> list[dict[str, Tensor]]:
        noise, taken = clip(12).double().requires_grad_(), []
        for loss in losses(noise, cached=cached):
            loss.backward(retain_graph=True)
            taken.append(gradients(denoiser) | ({} if noise.grad is None else {"noise": noise.grad}))
            noise.grad = None
        return taken

    actual = slopes(cached=True)
    if detach_cache:
        detach_context(monkeypatch)
    for first, second in zip(actual, slopes(cached=False), strict=True):
        assert first.keys() == second.keys() and ("noise" in first) is (steps == "all")
        for name, gradient in first.items():
            assert relative_error(gradient, second[name]) <= 1e-6, name


def test_gradient_of_the_last_chunk_reaches_the_first_only_through_a_cache_that_is_not_detached():
    for detach_cache, reached in ((True, [False, False, True]), (False, [True, True, True])):
        noise = clip(9).requires_grad_()
        latents = trained(tiny_denoiser(), noise, config(), detach_cache=detach_cache)
        (gradient,) = torch.autograd.grad(latents[:, 6:].square().sum(), noise)
        assert [part.abs().max() > 0 for part in gradient.split(3, dim=1)] == reached


@pytest.mark.parametrize("options", [{"context_noise": 100.0}, *RULES.values()])
def test_checkpointing_and_more_gradient_change_no_video_and_checkpointing_changes_no_gradient(options):
    denoiser, target, taken, made = tiny_denoiser(), clip(12, seed=5), [], []
    more = {"gradient_steps": GradientSteps.all, "detach_cache": False}
    for checkpointing, which in ((False, {}), (False, more), (True, more)):
        denoiser.transformer.gradient_checkpointing = checkpointing
        made.append(trained(denoiser, clip(12), config(**options), exit_step=1, **which))
        (made[-1] * target).sum().backward()
        taken.append(gradients(denoiser))
    assert relative_error(made[1], made[0]) <= 1e-5 and torch.equal(made[1], made[2])
    for name, gradient in taken[1].items():
        assert relative_error(taken[2][name], gradient) <= 1e-6, name
    assert any(relative_error(gradient, taken[0][name]) > 0.01 for name, gradient in taken[1].items())


def test_chunks_without_gradient_leave_the_cache_detached():
    noise = clip(9).requires_grad_()
    latents = trained(tiny_denoiser(), noise, config(), grad_start_frame=3, detach_cache=False)
    (gradient,) = torch.autograd.grad(latents[:, 6:].square().sum(), noise)
    assert [part.abs().max() > 0 for part in gradient.split(3, dim=1)] == [False, True, True]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_reaches_other_chunks(checkpointing):
    denoiser, noise = tiny_denoiser(), clip(9).requires_grad_()
    denoiser.transformer.gradient_checkpointing = checkpointing
    latents = trained(denoiser, noise, config())
    for chunk in range(3):
        own = slice(3 * chunk, 3 * chunk + 3)
        (gradient,) = torch.autograd.grad(latents[:, own].square().sum(), noise, retain_graph=True)
        reached = gradient.abs().amax(dim=(0, 2, 3, 4)) > 0
        assert reached.nonzero().flatten().tolist() == [3 * chunk, 3 * chunk + 1, 3 * chunk + 2]


def test_no_gradient_reaches_the_steps_before_the_exit():
    noise = clip(6).requires_grad_()
    latents = trained(tiny_denoiser(), noise, config(), exit_step=1)
    assert latents.requires_grad
    assert torch.autograd.grad(latents.sum(), noise, allow_unused=True) == (None,)


@pytest.mark.parametrize(("start", "learning"), [(None, 0), (0, 3), (3, 2), (4, 1), (9, 0)])
def test_gradient_begins_with_the_first_chunk_at_grad_start_frame(start, learning):
    kv = KVCache(2, append_only=True)
    blocks = list(rollout(tiny_denoiser(), clip(9), EMBEDS, kv, config(), grad_start_frame=start, exit_steps=[0, 0, 0]))
    assert [block.latents.requires_grad for block in blocks] == [False] * (3 - learning) + [True] * learning


@torch.no_grad()
def test_gradients_do_not_change_what_is_generated():
    denoiser, noise = tiny_denoiser(), clip(9)
    with torch.enable_grad():
        learning = trained(denoiser, noise, config(window=6), exit_step=1).detach()
    plain = latents_of(rollout(denoiser, noise, EMBEDS, KVCache(2), config(window=6), generator=seeded()))
    assert relative_error(learning, plain) <= 1e-5


@torch.no_grad()
def test_context_noise_is_committed_at_its_timestep():
    denoiser, told = tiny_denoiser(), []
    denoiser.register_forward_pre_hook(lambda _, args: told.append((args[1][0, 0].item(), args[0].clone())))
    blocks = list(rollout(denoiser, clip(6), EMBEDS, KVCache(2), config(context_noise=250.0), generator=seeded()))
    timestep, committed = told[2]
    generator = seeded()
    randn((1, 3, 4, 4, 6), generator, committed)  # the draw between the first chunk's two steps
    noise = randn((1, 3, 4, 4, 6), generator, committed)
    assert timestep == 250
    assert torch.equal(committed, add_noise(blocks[0].latents, noise, torch.full((1, 3), 250.0)))


def switched(style: SwitchStyle, rules: RolloutConfig, *, at: int = 4, chunks: int = 6, append_only: bool = False):
    """Return the blocks and passes of a rollout whose prompt changes to `OTHER` with chunk `at`."""
    noise = [ChunkInput(part) for part in clip(3 * chunks).split(3, dim=1)]
    noise[at] = replace(noise[at], prompt_embeds=OTHER, style=style)
    denoiser, blocks, passes = tiny_denoiser(), [], []
    kv = KVCache(2, append_only=append_only)
    steps = rollout_passes(rules.timesteps(denoiser), noise, EMBEDS, kv, rules, generator=seeded())
    event = next(steps)
    while event is not None:
        if isinstance(event, FinishedChunk):
            blocks.append(event)
            event = next(steps, None)
        else:
            passes.append(event)
            event = steps.send(event.run(denoiser))
    return blocks, passes


CONTEXTS = {
    "everything": ({}, range(12)),
    "window": ({"window": 9}, range(6, 12)),
    "window no multiple of the chunk": ({"window": 8}, range(7, 12)),
    "window of one chunk": ({"window": 3}, []),
    "sink": ({"window": 9, "sink": 2}, [0, 1, *range(8, 12)]),
    "relative sink": ({"window": 9, "sink": 2, "relative_positions": True}, [0, 1, *range(8, 12)]),
}


@torch.no_grad()
@pytest.mark.parametrize("append_only", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
def test_recache_equals_a_fresh_cache_of_the_same_frames_and_the_new_prompt(context, append_only):
    options, visible = CONTEXTS[context]
    rules = RolloutConfig(denoising_steps=[1000.0], **options)
    blocks, _ = switched(SwitchStyle.recache, rules, append_only=append_only)
    given = latents_of(blocks)[:, list(visible)] if visible else None
    fresh = rollout(tiny_denoiser(), clip(18)[:, 12:], OTHER, KVCache(2), rules, context_latents=given)
    assert relative_error(latents_of(blocks[4:]), latents_of(fresh)) <= 1e-6
    assert [block.start_frame for block in blocks] == list(range(0, 18, 3))


@torch.no_grad()
@pytest.mark.parametrize("relative", [False, True])
def test_recache_can_leave_the_sink_as_the_first_prompt_made_it(relative):
    rules = RolloutConfig(denoising_steps=[1000.0], window=9, sink=3, relative_positions=relative, recache_sink=False)
    blocks, _ = switched(SwitchStyle.recache, rules)
    denoiser, made, kv = tiny_denoiser(), latents_of(blocks), KVCache(2, window=9, sink=3, relative=relative)
    for start, frames, embeds in ((0, made[:, :3], EMBEDS), (3, made[:, 9:12], OTHER)):
        denoiser(frames, torch.zeros(1, 3), embeds, cache=kv, start_frame=start)
    expected = denoiser(clip(18)[:, 12:15], torch.full((1, 3), 1000.0), OTHER, cache=kv, start_frame=6).x0
    assert relative_error(blocks[4].latents, expected) <= 1e-5


@torch.no_grad()
def test_a_cut_begins_a_new_clip():
    rules = RolloutConfig(denoising_steps=[1000.0], window=6)
    blocks, _ = switched(SwitchStyle.cut, rules)
    fresh = rollout(tiny_denoiser(), clip(18)[:, 12:], OTHER, KVCache(2), rules)
    assert torch.equal(latents_of(blocks[4:]), latents_of(fresh))
    assert [block.start_frame for block in blocks] == list(range(0, 18, 3))


@torch.no_grad()
@pytest.mark.parametrize(
    ("style", "encoded"),
    [("keep", [(9, "old")]), ("blend", [(9, "old")]), ("cut", []), ("recache", [(0, "new")])],
)
def test_a_switch_encodes_what_its_style_says_and_every_later_pass_has_the_new_prompt(style, encoded):
    _, passes = switched(SwitchStyle(style), RolloutConfig(denoising_steps=[1000.0], window=9), chunks=5)
    names = {id(EMBEDS): "old", id(OTHER): "new"}
    *context, last = [step for step in passes if step.stage is Stage.context or step.prompt_embeds is OTHER][3:]
    assert [(step.start_frame, names[id(step.prompt_embeds)]) for step in context] == encoded
    assert (last.stage, last.prompt_embeds is OTHER) == (Stage.denoise, True)


@torch.no_grad()
def test_without_a_switch_chunks_with_and_without_a_prompt_of_their_own_are_the_same():
    denoiser, rules = tiny_denoiser(), config(window=6)
    plain = latents_of(rollout(denoiser, clip(9), EMBEDS, KVCache(2), rules, generator=seeded()))
    inputs = [ChunkInput(part, prompt_embeds=EMBEDS) for part in clip(9).split(3, dim=1)]
    assert torch.equal(latents_of(rollout(denoiser, inputs, OTHER, KVCache(2), rules, generator=seeded())), plain)


@torch.no_grad()
def test_a_chunk_may_begin_at_a_later_step():
    denoiser, rules = tiny_denoiser(), RolloutConfig(denoising_steps=[1000.0, 750.0, 500.0, 250.0])
    steps = rollout_passes(rules.timesteps(denoiser), [ChunkInput(clip(3), first_step=2)], EMBEDS, KVCache(2), rules)
    first = next(steps)
    second = steps.send(first.run(denoiser))
    assert torch.equal(first.latents, clip(3))
    assert [first.timestep, second.timestep] == rules.timesteps(denoiser)[2:]
    assert isinstance(steps.send(second.run(denoiser)), FinishedChunk)


def test_the_loop_itself_runs_nothing():
    steps = rollout_passes([1000.0, 500.0], clip(3), EMBEDS, KVCache(2), config())
    first = next(steps)
    answer = clip(3, seed=8)
    second = steps.send(answer)
    assert (first.stage, first.timestep, second.timestep) == (Stage.denoise, 1000.0, 500.0)
    assert steps.send(answer).latents is answer


@torch.no_grad()
@pytest.mark.parametrize("frames", [9, 15])
def test_relative_positions_equal_absolute_ones_while_nothing_has_been_evicted(frames):
    def run(relative, sink=2):
        rules = config(window=9, sink=sink, relative_positions=relative)
        return latents_of(rollout(tiny_denoiser(), clip(frames), EMBEDS, KVCache(2), rules, generator=seeded()))

    assert relative_error(run(True)[:, :9], run(False)[:, :9]) <= 1e-6
    assert (relative_error(run(True), run(False)) > 1e-4) is (frames > 9)
    assert relative_error(run(True, sink=0), run(False, sink=0)) <= 1e-6


def refused_rollout(**options):
    list(rollout(tiny_denoiser(), clip(6), EMBEDS, KVCache(2), config(), **options))


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        (lambda: config().chunks(8), "num_frames=8 is not a multiple of frames_per_chunk=3; use 6 or 9"),
        (lambda: config(independent_first_frame=True).chunks(9), "num_frames=9 is not 1 \\+ a multiple"),
        (lambda: config(window=2), "window=2 minus sink=0 is less than frames_per_chunk=3"),
        (lambda: config(window=6, sink=4), "window=6 minus sink=4 is less than frames_per_chunk=3"),
        (lambda: config(sink=-1), "sink=-1"),
        (lambda: config(frames_per_chunk=0), "frames_per_chunk=0"),
        (lambda: config(context_noise=1001.0), "context_noise=1001.0"),
        (lambda: RolloutConfig(denoising_steps=[500.0, 750.0]), r"denoising_steps=\[500.0, 750.0\] must descend"),
        (lambda: RolloutConfig(denoising_steps=[]), r"denoising_steps=\[\]"),
        (lambda: refused_rollout(exit_steps=[0]), "1 exit_steps for 2 chunks"),
    ],
)
def test_mistakes_are_refused_with_the_values(mistake, line):
    with pytest.raises(ValueError, match=line):
        mistake()


def test_a_rolling_cache_is_refused_under_grad():
    blocks = rollout(tiny_denoiser(), clip(6), EMBEDS, KVCache(2), config(window=3), grad_start_frame=0)
    with pytest.raises(ValueError, match="append_only=True"):
        next(blocks)


def test_each_chunk_may_have_steps_of_its_own():
    """Chunks take 4, 2 and 1 steps. The last list holds for all later chunks. Equal lists are the same as one list."""
    lists = [[1000.0, 750.0, 500.0, 250.0], [1000.0, 500.0], [1000.0]]
    denoiser, taken = tiny_denoiser(), []
    denoiser.register_forward_pre_hook(lambda _, args: taken.append(args[1][0, 0].item()))
    rules = config(denoising_steps=lists, warp_denoising_step=False)
    list(rollout(denoiser, clip(12), EMBEDS, KVCache(2), rules, generator=seeded()))
    assert [step for step in taken if step > 0] == [*lists[0], *lists[1], *lists[2], *lists[2]]
    made = []
    for steps in (lists[1], [lists[1], lists[1]]):
        rules = config(denoising_steps=steps)
        made.append(latents_of(rollout(tiny_denoiser(), clip(9), EMBEDS, KVCache(2), rules, generator=seeded())))
    assert torch.equal(*made)


def test_a_chunk_with_fewer_steps_than_the_exit_step_ends_at_its_last():
    denoiser, taken = tiny_denoiser(), []
    denoiser.register_forward_pre_hook(lambda _, args: taken.append(args[1][0, 0].item()))
    rules = config(denoising_steps=[[1000.0, 750.0, 500.0], [1000.0]], warp_denoising_step=False)
    list(rollout(denoiser, clip(6), EMBEDS, KVCache(2, append_only=True), rules, exit_steps=[1, 1]))
    assert taken == [1000.0, 750.0, 0.0, 1000.0]


@pytest.mark.parametrize(
    "steps",
    [[], [[]], [[1000.0], []], [1000.0, [500.0]], [500.0, 750.0], [[1000.0], [0.0]], ["a"], [float("nan")]],
)
def test_steps_that_do_not_descend_are_refused(steps):
    with pytest.raises(ValueError, match=r"denoising_steps=.* must descend within \(0, 1000\]"):
        config(denoising_steps=steps)


def test_steps_a_chunk_can_be_written_on_the_command_line(tmp_path):
    (tmp_path / "config.yaml").write_text("denoising_steps: [[1000, 750], [1000]]\n")
    assert load_config(RolloutConfig, tmp_path / "config.yaml").denoising_steps == [[1000.0, 750.0], [1000.0]]
    overrides = ["denoising_steps=[[1000,500],[750]]", "cache_dtype=fp8"]
    changed = load_config(RolloutConfig, tmp_path / "config.yaml", overrides)
    assert changed.denoising_steps == [[1000.0, 500.0], [750.0]] and changed.cache_dtype is CacheDtype.fp8
    assert from_dict(RolloutConfig, to_dict(changed), "test") == changed


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"window": 7, "sink": 1, "relative_positions": True}])
def test_a_cache_in_8_bits_is_close_and_takes_half_the_memory_of_bfloat16(options):
    """The error is the relative difference of the clip. The memory is that of the buffers with Wan's head dim (128)."""
    clips = []
    for more in ({}, {"cache_dtype": CacheDtype.fp8}):
        rules = config(**options, **more)
        clips.append(latents_of(rollout(tiny_denoiser(), clip(12), EMBEDS, KVCache(2), rules, generator=seeded())))
    assert 0 < relative_error(clips[1], clips[0]) <= 0.05
    layout = KeyLayout(1, 10, 2, 128, torch.bfloat16, torch.device("cpu"))
    sizes = []
    for fp8 in (False, True):
        layer = LayerCache.empty(layout, 6, sink=0, fp8=fp8)
        tensors = [layer.k.data, layer.v.data, *(part.scale for part in (layer.k, layer.v) if part.scale is not None)]
        sizes.append(sum(tensor.nbytes for tensor in tensors))
    assert sizes[1] / sizes[0] == pytest.approx((128 + 4) / 256)


def test_training_sees_the_keys_of_an_8_bit_cache_as_inference_does():
    """The exit pass gives the same x0 with and without grad, and gradients reach the keys of the new chunk."""
    rules = config(cache_dtype=CacheDtype.fp8)
    made = []
    for grad in (None, 0):
        denoiser = tiny_denoiser()
        chunks = rollout(
            denoiser, clip(6), EMBEDS, KVCache(2, append_only=True), rules, exit_steps=[0, 0], grad_start_frame=grad
        )
        made.append(latents_of(chunks))
    assert relative_error(made[1].detach(), made[0]) <= 1e-5
    made[1].sum().backward()
    assert all(block.self_attn.k.weight.grad.abs().sum() > 0 for block in denoiser.transformer.blocks)
