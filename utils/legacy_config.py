"""Answer a YAML file of the official code with the lines to write instead.

`OFFICIAL_KEYS` is the one table of the keys of guandeh17/Self-Forcing and of its relatives CausVid, LongLive,
Causal-Forcing and krea-ai/realtime-video. A translation keeps the meaning that the value has there.
"""

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError

Translation = Callable[[Any], dict[str, Any]]
"""A function from an old value to our dotted keys and their values."""
InFile = Callable[[Any, Mapping[str, Any]], dict[str, Any]]
"""Such a function for a value whose meaning depends on the rest of the file."""

VAE_SCALE = 8  # pixels a latent, of the Wan VAE
VAE_FRAMES = 4  # frames a latent frame after the first
MODELS = {"1.3B": "wan2.1-t2v-1.3b", "14B": "wan2.1-t2v-14b"}
LONGLIVE_FRAMES = 21  # a window of LongLive, if streaming_chunk_size does not say it
OBJECTIVES = {
    "ode": "ode_regression",
    "diffusion": "diffusion",
    "gan": "self_forcing_gan",
    "consistency_distillation": "causal_consistency",
    "dmd": "self_forcing_dmd",
    "sid": "self_forcing_sid",
    "causvid": "causvid",
    "dmd_switch": "self_forcing_continued",
}


def to(*keys: str) -> Translation:
    """Translate to the same value under other names."""
    return lambda value: dict.fromkeys(keys, value)


def _network(section: str) -> Translation:
    """Translate a name such as Wan2.1-T2V-14B to the preset and weights of a section."""
    return lambda name: {
        f"{section}.preset": MODELS[name.rpartition("-")[2]],
        f"{section}.weights": f"wan_models/{name}",
    }


def _objective(name: str) -> dict[str, Any]:
    return {"objective": OBJECTIVES[name]} if name != "score_distillation" else {}  # distribution_loss says which


def _guidance(scale: float, file: Mapping[str, Any]) -> dict[str, Any]:
    """Translate `guidance_scale`: it belongs to a sampler, to a consistency teacher, or to the real score."""
    trainer = file.get("trainer")
    if trainer == "consistency_distillation":
        return {"consistency.guidance_scale": scale}
    return {"sampling.guidance_scale" if trainer in ("diffusion", "ode") else "dmd.real_guidance_scale": scale}


def _steps(steps: list[float], file: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the steps. A final 0 ends the list. Without backward simulation (CausVid), it is a trained step."""
    ours: dict[str, Any] = {"rollout.denoising_steps": [step for step in steps if step > 0]}
    trained_on = 0 in steps and file.get("backward_simulation") is False
    return ours | ({"dmd.clean_step": True} if trained_on else {})


def _lora(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Translate LongLive's LoRA. The critic has it too, unless `apply_to_critic` is false. It has no average."""
    sections = ["lora", "critic_lora"] if adapter.get("apply_to_critic", True) else ["lora"]
    ours = {f"{section}.{name}": adapter[name] for section in sections for name in ("rank", "alpha")}
    return ours | {"trainer.ema_decay": 0.0}


def _windows(longest: int, file: Mapping[str, Any]) -> dict[str, Any]:
    """Translate LongLive's longest rollout to windows: first `streaming_chunk_size` frames, then new frames in each."""
    shown, new = file.get("streaming_chunk_size", LONGLIVE_FRAMES), file.get("streaming_min_new_frame", 18)
    return {"long.windows": 1 + (longest - shown) // new, "long.overlap": shown - new}


def _last_switch(frames: list[int], file: Mapping[str, Any]) -> dict[str, Any]:
    shown, new = file.get("streaming_chunk_size", LONGLIVE_FRAMES), file.get("streaming_min_new_frame", 18)
    return {"long.last_switch": 1 + (max(frames) - shown) // new}


def _window_of_krea(frames: int, file: Mapping[str, Any]) -> dict[str, Any]:
    return {"rollout.window": frames + file.get("num_frame_per_block", 3)}


def _video_shape(shape: list[int]) -> dict[str, Any]:
    _, frames, _, height, width = shape
    return {"video.num_frames": frames, "video.height": height * VAE_SCALE, "video.width": width * VAE_SCALE}


OFFICIAL_KEYS: dict[str, Translation] = {
    "generator_ckpt": to("student.weights"),
    "checkpoint_path": to("generator.weights"),
    "lora_ckpt": to("generator.lora"),
    "adapter": _lora,
    "use_taehv": lambda on: {"codec.kind": "tiny", "codec.weights": "checkpoints/taew2_1.pth"} if on else {},
    "real_name": _network("real_score"),
    "fake_name": _network("fake_score"),
    "model_name": lambda name: {} if name in ("wan", "causal_wan") else _network("student")(name),
    "generator_name": lambda name: {} if name in ("wan", "causal_wan") else _network("student")(name),
    "trainer": _objective,
    "distribution_loss": _objective,
    "distillation_loss": _objective,
    "teacher_forcing": lambda on: {"diffusion.forcing": "teacher_forcing" if on else "diffusion_forcing"},
    "causal": lambda on: {} if on else {"diffusion.forcing": "bidirectional"},
    "warp_denoising_step": to("rollout.warp_denoising_step"),
    "num_frame_per_block": to("rollout.frames_per_chunk"),
    "independent_first_frame": to("rollout.independent_first_frame"),
    "context_noise": to("rollout.context_noise"),
    "model_kwargs.local_attn_size": lambda frames: {"rollout.window": None if frames == -1 else frames},
    "model_kwargs.sink_size": to("rollout.sink"),
    "model_kwargs.timestep_shift": to("generator.shift", "student.shift"),
    "timestep_shift": to("generator.shift", "student.shift"),
    "gradient_checkpointing": to("student.gradient_checkpointing", "fake_score.gradient_checkpointing"),
    "real_guidance_scale": to("dmd.real_guidance_scale"),
    "fake_guidance_scale": to("dmd.fake_guidance_scale"),
    "ts_schedule": to("dmd.ts_schedule"),
    "ts_schedule_max": to("dmd.ts_schedule_max"),
    "min_score_timestep": to("dmd.min_timestep"),
    "noise_augmentation_max_timestep": to("diffusion.noise_augmentation_max_timestep"),
    "global_sink": lambda on: {"rollout.recache_sink": not on},
    "do_kv_recomp": to("rollout.recompute"),
    "switch_prompt_path": to("data.switch_path"),
    "streaming_chunk_size": to("video.num_frames"),
    "use_ema": to("generator.use_ema"),
    "dfake_gen_update_ratio": to("dmd.critic_updates"),
    "sid_alpha": to("sid.alpha"),
    "gan_g_weight": to("gan.generator_weight"),
    "gan_d_weight": to("gan.discriminator_weight"),
    "r1_weight": to("gan.r1_weight"),
    "r2_weight": to("gan.r2_weight"),
    "r1_sigma": to("gan.perturbation_sigma"),
    "r2_sigma": to("gan.perturbation_sigma"),
    "relativistic_discriminator": lambda on: {"gan.kind": "relativistic" if on else "non_saturating"},
    "discrete_cd_N": to("consistency.solver_steps"),
    "negative_prompt": to("sampling.negative_prompt"),
    "lr": to("optimizer.lr"),
    "gen_lr": to("optimizer.lr"),
    "lr_critic": to("critic_optimizer.lr"),
    "critic_lr": to("critic_optimizer.lr"),
    "beta1": to("optimizer.betas[0]"),
    "beta2": to("optimizer.betas[1]"),
    "beta1_critic": to("critic_optimizer.betas[0]"),
    "beta2_critic": to("critic_optimizer.betas[1]"),
    "weight_decay": to("optimizer.weight_decay", "critic_optimizer.weight_decay"),
    "max_grad_norm_generator": to("optimizer.clip_norm"),
    "max_grad_norm_critic": to("critic_optimizer.clip_norm"),
    "batch_size": to("trainer.batch_size"),
    "total_batch_size": to("trainer.total_batch_size"),
    "max_checkpoints": to("trainer.keep_last"),
    "max_iters": to("trainer.steps"),
    "ema_weight": to("trainer.ema_decay"),
    "ema_start_step": to("trainer.ema_start_step"),
    "log_iters": to("trainer.save_every"),
    "seed": to("trainer.seed", "inference.seed"),
    "mixed_precision": lambda on: dict.fromkeys(("parallel.precision", "dtype"), "bfloat16" if on else "float32"),
    "data_path": to("data.path", "inference.data_path"),
    "validation_prompts_file": to("data.sample_prompts"),
    "val_data_path": to("data.sample_prompts"),
    "image_or_video_shape": _video_shape,
    "num_training_frames": to("video.num_frames"),
    "num_output_frames": to("video.num_frames"),
    "num_frames": lambda frames: {"video.num_frames": 1 + (frames - 1) // VAE_FRAMES},
    "height": to("video.height"),
    "width": to("video.width"),
    "output_folder": to("inference.output_folder"),
    "num_samples": to("inference.num_samples"),
}
IN_FILE: dict[str, InFile] = {
    "guidance_scale": _guidance,
    "denoising_step_list": _steps,
    "streaming_max_length": _windows,
    "switch_choices": _last_switch,
    "kv_cache_num_frames": _window_of_krea,
}
"""Keys whose translation depends on other keys of the same file."""

ITERATIONS = ("max_iters", "ema_start_step", "log_iters")
"""The official distillation counts updates of the critic; trainer.steps counts those of the generator."""

# Keys without a translation. A command line option replaces them, or the code decides.
OPTIONS = {"i2v": "--i2v", "save_with_index": "--save_with_index", "output_path": "--logdir"}
NO_KEY = (
    *("*_fsdp_wrap_strategy", "*_grad", "*_task", "*_task_type", "wandb_*", "sharding_strategy"),
    *("num_train_timestep", "denoising_loss_type", "same_step_across_blocks", "gc_interval", "ckpt_step"),
    *("last_step_only", "discriminator_lr_multiplier", "concat_time_embeddings", "num_class", "backward_simulation"),
    *("load_raw_video", "prompt_name", "prompt_path", "eval_first_n", "validate_first_n", "inference_iter"),
    *("text_encoder_cpu_offload", "gradient_accumulation_steps", "streaming_training", "streaming_min_new_frame"),
    *("streaming_possible_max_length", "switch_mode", "*switch_frame_ind*", "fixed_switch_index", "vis_*"),
    *("val_batch_size", "val_switch_prompt_path", "slice_last_frames", "min_num_training_frames"),
    *(
        "train_first_chunk",
        "clear_context",
        "memorize",
        "use_trt",
        "enable_fp8",
        "grad_accum",
        "spatial_sf",
        "is_causal",
    ),
)


def refuse_official_keys(values: Mapping[str, Any], known: Collection[str], source: str | Path) -> None:
    """Raise UserError with the new lines for every key of the official code. `known`: the names in the schema."""
    flat = _flatten(values)
    found = [key for key in flat if (key not in known or isinstance(flat[key], str)) and _is_official(key)]
    if not found:
        return
    answers = {key: _translate(key, flat) for key in found}
    lines = [f"  {key}: {', '.join(new)}" for key, new in answers.items() if new]
    if dropped := [key for key, new in answers.items() if not new]:
        lines.append(f"  no key here: {', '.join(dropped)}")
    if "dfake_gen_update_ratio" in found and any(key in found for key in ITERATIONS):
        lines.append(
            f"  divide {', '.join(ITERATIONS)} by dfake_gen_update_ratio: a step here updates the generator once"
        )
    start = "has keys of the official code; nothing was loaded. Here they are (see configs/self_forcing_dmd.yaml)"
    raise UserError("\n".join([f"{source}: {start}:", *lines]))


def _is_official(key: str) -> bool:
    return (
        key in OFFICIAL_KEYS
        or key in IN_FILE
        or key in OPTIONS
        or any(fnmatchcase(str(key), pattern) for pattern in NO_KEY)
    )


def _translate(key: str, file: Mapping[str, Any]) -> list[str]:
    """Return `section.key=value` for each new key, or a sentence if the official code does not accept the value."""
    if key in OPTIONS:
        return [f"the option {OPTIONS[key]}"]
    try:
        if key in IN_FILE:
            new = IN_FILE[key](file[key], file)
        elif key in OFFICIAL_KEYS:
            new = OFFICIAL_KEYS[key](file[key])
        else:
            return []
    except (AttributeError, KeyError, TypeError, ValueError):
        return [f"{_show(file[key])} is not a value that the official code accepts"]
    return [f"{name}={_show(translated)}" for name, translated in new.items()]


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace `model_kwargs` by dotted keys."""
    inner = values.get("model_kwargs")
    if not isinstance(inner, Mapping):
        return dict(values)
    rest = {key: value for key, value in values.items() if key != "model_kwargs"}
    return rest | {f"model_kwargs.{key}": value for key, value in inner.items()}


def _show(value: Any) -> str:
    text = (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("\n...\n").strip()
    )
    return text if len(text) <= 60 else f"{text[:57]}..."
