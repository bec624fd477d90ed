"""The core reproduces recordings of the official Self-Forcing code to 1e-4 relative.

Deliberate differences, and how the tests handle each of them:

1. sigma = t / 1000 exactly. The official code looks levels up in a table of 1000 entries, and it converts the output of
   the score models with the table of shift 8. Here :class:`OfficialDenoiser` and :class:`OfficialScore` do the same.
   Levels that are in the table need no special treatment.
2. There is no context pass after the last chunk. So one random draw is not used, and the cached keys of the last chunk
   are not compared.
3. Keys and values of earlier chunks are detached. Gradients are compared with a recording of the detached variant if
   there is one. Otherwise only gradients are compared that the leak cannot reach: those of the head, and in the last
   block those of the layers after its keys and values.
4. Context noise 0 means clean. The official training commits the context at the last level of its table, and the
   network gets timestep 0. The tests ask for that level.
"""

import pytest
import torch
from torch import Tensor

from model.attention import block_causal_mask, teacher_forcing_mask
from model.denoiser import Denoiser
from model.flow_matching import FlowMatching, add_noise, flow_to_x0, x0_to_flow
from model.kv_cache import KVCache
from pipeline.rollout import RolloutConfig, rollout
from pipeline.sampling import SamplingConfig, sample_causal
from tests.parity import (
    OfficialDenoiser,
    OfficialScore,
    gradients,
    last_level,
    load_case,
    needs_recordings,
    recorded_denoiser,
    relative_error,
)
from trainer.objectives.diffusion import forcing_loss
from trainer.objectives.dmd import critic_loss, dmd_loss
from trainer.objectives.ode import ode_regression_loss

pytestmark = needs_recordings
TOLERANCE = 1e-4


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert relative_error(actual, expected) <= tolerance


def assert_same_gradients(module: Denoiser, case: dict, norms: dict, keep=lambda name: True, *, full: int) -> None:
    """Compare the norms of the gradients of all kept parameters, and the `full` gradients that are recorded whole."""
    taken = gradients(module.transformer)
    names = {name.removeprefix("model."): norm for name, norm in norms.items() if keep(name.removeprefix("model."))}
    assert names and names.keys() <= taken.keys()
    for name, norm in names.items():
        assert taken[name].norm().item() == pytest.approx(norm, rel=TOLERANCE), name
    whole = [key for key in case if key.startswith("grad.") and keep(key.removeprefix("grad."))]
    assert len(whole) == full
    for key in whole:
        assert_close(taken[key.removeprefix("grad.")], case[key])


def beyond_the_leak(name: str) -> bool:
    """Return whether no gradient through keys and values of earlier chunks reaches this parameter."""
    own = ("self_attn.q", "self_attn.norm_q", "self_attn.o", "norm3", "cross_attn.q", "cross_attn.norm_q", "ffn")
    return name.startswith(("head.", *(f"blocks.2.{part}" for part in (*own, "cross_attn.o"))))


@pytest.fixture
def inject(monkeypatch):
    """Give a function that feeds recorded draws to the rollout in order. It returns the unused ones."""

    def feed(case: dict, names: slice = slice(None)) -> list[Tensor]:
        left = [case[key] for key in sorted(case) if "randn_like" in key][names]
        monkeypatch.setattr("pipeline.rollout.randn", lambda shape, generator, like: left.pop(0).view(shape))
        return left

    return feed


@pytest.mark.parametrize("shift", [5, 8])
def test_01_schedule(shift):
    case, _ = load_case("case01_scheduler")
    schedule = FlowMatching(shift)
    grid = schedule.grid(1000)
    assert_close(grid, case[f"s{shift}.timesteps"], 1e-6)
    assert_close(schedule.training_weight(grid), case[f"s{shift}.weights"], 1e-5)
    assert_close(torch.tensor(schedule.warp([1000, 750, 500, 250, 0])), case[f"s{shift}.warped_steps_with_0"], 1e-6)
    assert_close(FlowMatching(8).grid(48), case["ode48.timesteps"], 1e-6)


@pytest.mark.parametrize("shift", [5, 8])
def test_01_conversions_at_tabled_levels(shift):
    case, _ = load_case("case01_scheduler")
    x0, noise, flow = case["x0"][:, None], case["noise"][:, None], case["flow"][:, None]
    recorded = {name: case[f"s{shift}.{name}"][:, None] for name in ("add_noise", "x0_from_flow", "flow_from_x0")}
    tabled = case[f"s{shift}.timesteps"][case[f"s{shift}.lookup_id"]][:, None]
    noisy = add_noise(x0, noise, tabled)
    assert_close(noisy, recorded["add_noise"], 1e-6)
    assert_close(flow_to_x0(flow, noisy, tabled), recorded["x0_from_flow"], 1e-6)
    assert_close(x0_to_flow(x0, noisy, tabled), recorded["flow_from_x0"])
    weight = FlowMatching(shift).training_weight(tabled[:, 0])
    assert_close(weight, case[f"s{shift}.training_weight"], 1e-5)


@torch.no_grad()
def test_02_bidirectional():
    case, meta = load_case("case02_bidirectional_B1")
    denoiser = recorded_denoiser("real", shift=meta["shift"], kind=OfficialScore)
    prediction = denoiser(case["x"], case["timestep"], case["prompt_embeds"])
    assert_close(prediction.flow, case["flow_pred"])
    assert_close(prediction.x0, case["x0"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["case03a_causal_block3", "case03e_causal_indep_first"])
def test_03_block_causal(name):
    case, meta = load_case(name)
    independent = meta["independent_first_frame"]
    mask = block_causal_mask(case["x"].shape[1], meta["num_frame_per_block"], independent_first_frame=independent)
    assert torch.equal(mask.dense(), case["frame_mask"].bool())
    denoiser = recorded_denoiser(kind=OfficialDenoiser)
    prediction = denoiser(case["x"], case["timestep"], case["prompt_embeds"], block_mask=mask)
    assert_close(prediction.flow, case["flow_pred"])
    if "x0" in case:
        assert_close(prediction.x0, case["x0"])


@torch.no_grad()
def test_04_teacher_forcing():
    case, meta = load_case("case04a_tf_noaug")
    frames = case["x"].shape[1]
    mask = teacher_forcing_mask(frames, meta["num_frame_per_block"])
    assert torch.equal(mask.dense(), case["frame_mask"].bool())
    latents = torch.cat([case["clean_x"], case["x"]], dim=1)
    timesteps = torch.cat([torch.zeros_like(case["timestep"]), case["timestep"]], dim=1)
    flow = recorded_denoiser()(latents, timesteps, case["prompt_embeds"], block_mask=mask).flow
    assert_close(flow[:, frames:], case["flow_pred"])


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("case05a_rollout_B1", None),
        ("case05c_i2v_indep_init1", None),
        ("case05e_indep_noinit_F10", None),
        ("case06a_rolling_local6_sink0", 6),
    ],
)
def test_05_06_rollout_and_the_keys_it_leaves(name, window, inject):
    case, meta = load_case(name)
    left = inject(case)
    independent = meta["args"]["independent_first_frame"]
    config = RolloutConfig(independent_first_frame=independent, window=window)
    kv, given = KVCache(3), case.get("initial_latent")
    blocks = rollout(recorded_denoiser(), case["noise"], case["prompt_embeds"], kv, config, context_latents=given)
    output = torch.cat([*([] if given is None else [given]), *(block.latents for block in blocks)], dim=1)
    assert_close(output, case["output"])
    assert not left

    # The three frames before the last chunk (with a window, all else that it holds) or the first three.
    start = output.shape[1] - 3
    live = torch.zeros(1, 3, 24, 2, 32)
    with torch.no_grad():
        keys, _ = kv.extend(0, live, live, start)
    assert_close(keys[:, :72], case["kv_k_layer0"][:, :72])


def test_07_unipc_causal_sampling_with_guidance():
    case, meta = load_case("case07a_multistep_unipc")
    config = SamplingConfig(steps=meta["sampling_steps"], guidance_scale=meta["guidance_scale"])
    assert_close(config.timesteps(FlowMatching(meta["shift"])).float() / 1000, case["solver_sigmas"][:-1], 1e-6)
    blocks = sample_causal(
        recorded_denoiser(), case["noise"], case["prompt_embeds"], case["negative_embeds"], RolloutConfig(), config
    )
    assert_close(torch.cat([block.latents for block in blocks], dim=1), case["output"])


def official_rollout(generator: Denoiser, noise: Tensor, embeds: Tensor, exit_step: int) -> Tensor:
    """Make a training rollout that commits its context as the official code does (difference 4)."""
    config = RolloutConfig(context_noise=last_level(generator.schedule))
    blocks = rollout(
        generator,
        noise,
        embeds,
        KVCache(3, append_only=True),
        config,
        exit_steps=[exit_step] * 3,
        grad_start_frame=0,
    )
    return torch.cat([block.latents for block in blocks], dim=1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_08_self_forcing_rollout_and_its_gradients(checkpointing, inject):
    case, meta = load_case("case08_exit0")
    common, _ = load_case("case08_common")
    left = inject(case)
    generator = recorded_denoiser(kind=OfficialDenoiser)
    generator.transformer.gradient_checkpointing = checkpointing
    output = official_rollout(generator, common["noise"], common["prompt_embeds"], meta["exit_step"])
    assert_close(output, case["output"])
    assert len(left) == 1

    (output * common["R"]).sum().backward()
    differs = meta["rel_diff_kvdetached_vs_official"]
    exact = {name.removeprefix("grad.") for name, value in differs.items() if value == 0}
    kept = {key: case[key] for key in case if key.removeprefix("grad.") in exact}
    assert_same_gradients(generator, kept, meta["grad_norms_kvdetached"], full=len(exact))


@pytest.fixture
def scored(inject):
    """Give a function that returns the generator of a case, its video, both score models, and the loss arguments."""

    def prepare(name: str):
        case, meta = load_case(name)
        common, _ = load_case("case09_common")
        left = inject(case)
        noise, exit_step = case["draw_01_randn"], meta["forced_randint"]["1"][0]
        generator = recorded_denoiser(kind=OfficialDenoiser)
        video = official_rollout(generator, noise, common["prompt_embeds"], exit_step)
        assert len(left) == 2
        scores = [recorded_denoiser(weights, kind=OfficialScore) for weights in ("real", "fake")]
        level = torch.tensor(meta["forced_randint"]["2"]) / 1000
        return (
            case,
            meta,
            common,
            generator,
            video,
            scores,
            {"timesteps": FlowMatching(5).timestep(level), "noise": left[-1]},
        )

    return prepare


def test_09a_dmd_generator(scored):
    case, meta, common, generator, video, (real, fake), drawn = scored("case09a_dmd_generator")
    assert_close(drawn["timesteps"].expand(-1, 9), case["log.timestep"], 1e-6)
    embeds = common["prompt_embeds"], common["negative_embeds"]
    guidance = meta["args"]["guidance_scale"]
    loss, gradient = dmd_loss(video, real, fake, *embeds, **drawn, real_guidance_scale=guidance)
    assert loss.item() == pytest.approx(meta["loss"], rel=TOLERANCE)
    assert gradient.item() == pytest.approx(case["log.dmdtrain_gradient_norm"].item(), rel=TOLERANCE)
    loss.backward()
    assert gradients(real) == {} and gradients(fake) == {}
    assert_same_gradients(generator, case, meta["grad_norms"], beyond_the_leak, full=3)


def test_09b_critic(scored):
    case, meta, common, generator, video, (_, fake), drawn = scored("case09b_dmd_critic")
    assert_close(drawn["timesteps"].expand(-1, 9), case["log.critic_timestep"], 1e-6)
    loss = critic_loss(video, fake, common["prompt_embeds"], **drawn)
    assert loss.item() == pytest.approx(meta["loss"], rel=TOLERANCE)
    loss.backward()
    assert gradients(generator) == {}
    assert_same_gradients(fake, case, meta["grad_norms"], full=5)


def test_09h_ode_regression():
    case, meta = load_case("case09h_ode")
    common, _ = load_case("case09_common")
    generator = recorded_denoiser(kind=OfficialDenoiser)
    index = case["draw_00_randint"][:, ::3].repeat_interleave(3, dim=1)
    steps = RolloutConfig().timesteps(generator)
    noisy, timesteps = case["ode_latent"][:, index[0], torch.arange(9)], torch.tensor(steps)[index]
    assert timesteps.mean().item() == pytest.approx(case["log.timestep"].item())
    target, mask = case["ode_latent"][:, -1], block_causal_mask(9, 3)
    loss = ode_regression_loss(generator, noisy, timesteps, target, common["prompt_embeds"], mask)
    assert loss.item() == pytest.approx(meta["loss"], rel=TOLERANCE)
    loss.backward()
    assert_same_gradients(generator, case, meta["grad_norms"], full=5)


def test_09i_diffusion_forcing():
    case, meta = load_case("case09i_diffusion_forcing")
    common, _ = load_case("case09_common")
    generator = recorded_denoiser()
    index = case["draw_01_randint"][:, ::3].repeat_interleave(3, dim=1)
    loss = forcing_loss(
        generator,
        common["clean_latent"],
        common["prompt_embeds"],
        timesteps=generator.schedule.grid(1000)[index],
        noise=case["draw_00_randn_like"],
        block_mask=block_causal_mask(9, 3),
        bell_weights=True,
    )
    assert loss.item() == pytest.approx(meta["loss"], rel=TOLERANCE)
    loss.backward()
    assert_same_gradients(generator, case, meta["grad_norms"], full=5)
