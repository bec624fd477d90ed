"""What each curve of a report is, and what is normal: one or two sentences."""

from __future__ import annotations

MEANINGS = {
    "loss": "What this training minimizes. It falls quickly, then slowly, and stays noisy.",
    "psnr": "How closely the decoder restores its input, in dB. Higher is better; it rises and levels off.",
    "generator_loss": (
        "Loss of the generator against both scores. It hovers rather than falls: judge the samples instead."
    ),
    "critic_loss": (
        "Loss of fake_score on the generator's videos. It rises while the generator changes quickly, and then levels "
        "off. A rise without end is a warning."
    ),
    "score_gradient": (
        "Mean size of the difference between fake_score and real_score. It shrinks as the videos come to match."
    ),
    "sample_variance": (
        "Variance of the generated latents. It stays near that of real ones; a fall towards 0 is a collapse."
    ),
    "adversarial_loss": (
        "Loss of the generator against the discriminator. 0.69 means that it cannot tell; far above, the "
        "discriminator wins."
    ),
    "adversarial_gradient": (
        "Gradient that the discriminator gives the generator. It should be of the order of the other gradients."
    ),
    "regression_loss": "Distance to the given targets. It falls and levels off.",
    "discriminator_loss": (
        "Loss of the discriminator. Near 0.69 it cannot tell the videos apart; near 0 it wins too easily."
    ),
    "real_logit": "What the discriminator says of real videos. It stays a little above that of generated ones.",
    "fake_logit": "What the discriminator says of generated videos. It stays a little below that of real ones.",
    "penalty": "Penalty on the slope of the discriminator. It stays small.",
    "gradient_norm": (
        "Length of the gradient before it is clipped. It settles after the warm-up; single peaks are normal."
    ),
    "critic_gradient_norm": "Length of the critic's gradient before it is clipped. It settles after the warm-up.",
    "lr": "Learning rate. It follows the schedule of the configuration.",
    "critic_lr": "Learning rate of the critic. It follows the schedule of the configuration.",
    "skipped": "Steps that were left out because a value was not finite. It should stay 0.",
    "seconds": "Seconds of a step. Level is normal; peaks are checkpoints and samples.",
    "memory_gib": "Largest memory so far, in GiB. It is level after the first steps; a steady rise is a leak.",
    "samples_per_second": "Videos of the batch per second. Level is normal.",
}
UNKNOWN = "A figure of this objective; docs/objectives.md explains it."


def meaning(name: str) -> str:
    """Return what a curve is and what is normal. A curve of several parts has the meaning of its last words."""
    words = name.split("_")
    tails = ("_".join(words[start:]) for start in range(len(words)))
    return next((MEANINGS[tail] for tail in tails if tail in MEANINGS), UNKNOWN)
