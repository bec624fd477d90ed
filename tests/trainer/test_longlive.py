"""Twenty steps of configs/longlive.yaml on a small release in Wan's layout have the same windows as the source.

The source is NVlabs/LongLive, branch v1.0: model/streaming_training.py (windows, overlap, scored frames),
trainer/distillation.py (one critic update in each iteration, on the next window; switch frames; no average of a LoRA)
and configs/longlive_train_long.yaml (21 frames, then 18 new ones, at most 240, switches at 21 + 18 k up to 201).
"""

from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.fake_release import copy_fake_release
from tests.shapes_parts import SMALL_CODEC, tiny_codec
from trainer.build import build_trainer
from trainer.config import Config
from trainer.trainer import RunContext
from utils.config import load_config
from utils.distributed import Ranks
from utils.tracking import Tracker

REPOSITORY = Path(__file__).resolve().parents[2]
FIRST = [f"first prompt {number}" for number in range(24)]
SECOND = [f"second prompt {number}" for number in range(24)]
WINDOWS = [21] + 12 * [18]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longlive")
    release = copy_fake_release(tmp_path_factory, folder)
    (folder / "first.txt").write_text("\n".join(FIRST))
    (folder / "second.txt").write_text("\n".join(SECOND))
    tiny_codec(SMALL_CODEC).save_pretrained(folder / "codec")
    small, text = release.small, f"text_encoder.weights={release.small}/models_t5_umt5-xxl-enc-bf16.pth"
    overrides = [
        f"student.weights={release.checkpoints}/ode_init.pt",
        f"fake_score.weights={small}",
        f"real_score.weights={small}",
        "real_score.preset=wan2.1-t2v-1.3b",
        *("codec.kind=tiny", f"codec.weights={folder}/codec"),
        *(text, f"text_encoder.tokenizer={small}/google/umt5-xxl", "text_encoder.cache=null"),
        *(f"data.path={folder}/first.txt", f"data.switch_path={folder}/second.txt"),
        *("video.height=8", "video.width=8", "trainer.total_batch_size=1", "device=cpu"),
        *(
            "rollout.denoising_steps=[1000]",
            "student.gradient_checkpointing=false",
            "fake_score.gradient_checkpointing=false",
            "dmd.real_guidance_scale=0",
        ),  # quicker, and counted alike
        *("lora.rank=2", "lora.alpha=2", "critic_lora.rank=2", "critic_lora.alpha=2"),
    ]
    config = load_config(Config, REPOSITORY / "configs" / "longlive.yaml", overrides)
    tracker = Tracker(folder, config={}, is_main=False)
    return build_trainer(config, RunContext(folder, torch.device("cpu"), Ranks(), tracker))


@pytest.fixture(scope="module")
def made(trainer) -> list[dict]:
    """Give every window of twenty steps in order: who made it, its number of new frames, prompts, and scored frames."""
    generation, windows = trainer.generation, []
    video, roll = generation.video, generation.roll

    def rolled(micro_batch, embeds, frames, **options):
        windows[-1] |= {"new": frames, "context": options.get("context")}
        return roll(micro_batch, embeds, frames, **options)

    def noted(micro_batch, batch, *, with_grad):
        place = generation.progress.window
        prompts = generation.progress.prompts[0]
        windows.append({"generator": with_grad, "window": place, "first": prompts, "embeds": batch.embeds})
        made = video(micro_batch, batch, with_grad=with_grad)
        windows[-1] |= {"frames": made.latents.shape[1], "facts": made.facts}
        return made

    generation.video, generation.roll = noted, rolled
    for _ in range(20):
        assert trainer.train_step()["skipped"] == 0
    return windows


def test_a_rollout_has_a_window_of_21_frames_and_12_of_18_new_ones_after_3_old_ones(made):
    rollouts = [made[start : start + 13] for start in range(0, len(made), 13)]
    for rollout in rollouts:
        assert [window["new"] for window in rollout] == WINDOWS[: len(rollout)]
        assert all(window["frames"] == 21 for window in rollout)
        assert len({window["first"] for window in rollout}) == 1
    assert len({rollout[0]["first"] for rollout in rollouts}) == len(rollouts) == 10
    assert sum(WINDOWS) == 237 and 237 + 18 > 240  # why a 14th window is never made


def test_only_the_new_frames_count_for_generator_and_critic(made):
    for window in made:
        old = 21 - window["new"]
        assert old == (3 if window["window"] else 0)
        assert window["facts"].uncounted == window["facts"].uncounted_by_critic == old


def test_every_update_makes_the_next_window_six_a_step(made):
    """Every iteration updates the critic, every fifth one the generator. 600 steps are 277 rollouts, not 50."""
    assert len(made) == 20 * 6
    assert [window["generator"] for window in made] == 20 * ([True] + 5 * [False])
    assert [window["window"] for window in made] == [number % 13 for number in range(120)]
    learned = Counter(window["window"] for window in made if window["generator"])
    assert len(learned) == 13  # the generator learns from every place in a rollout
    assert 600 * 6 // 13 + 1 == 277


def test_the_context_is_the_sink_and_the_latest_frames_of_the_window(made):
    for window in made:
        assert (window["context"] is None) == (window["window"] == 0)
        assert window["context"] is None or window["context"].shape[1] == 12 - 3


def test_the_second_prompt_is_the_partner_of_the_first_and_begins_at_21_plus_18_k(trainer, made):
    starts = [0, *(21 + 18 * k for k in range(12))]
    switches = []
    for start in range(0, 117, 13):
        rollout = made[start : start + 13]
        number = FIRST.index(*trainer.data.read(rollout[0]["first"]).prompts)
        first, second = (trainer.text_encoder.encode([texts[number]]) for texts in (FIRST, SECOND))
        told = [torch.equal(window["embeds"], second) for window in rollout]
        assert [torch.equal(window["embeds"], first) for window in rollout] == [not second for second in told]
        place = told.index(True)
        assert told == [number >= place for number in range(13)]  # once, and for the rest of the rollout
        switches.append(starts[place])
    assert set(switches) <= {21 + 18 * k for k in range(11)} and len(set(switches)) > 3
    assert 219 not in switches


def test_a_lora_has_no_average(trainer, made):
    assert trainer.ema.decay == 0
    state = trainer.trained["generator"].state_dict()
    assert all(
        torch.equal(value, state[name.removeprefix("generator.")]) for name, value in trainer.ema.average.items()
    )
