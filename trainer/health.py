"""Detects trouble in a training: steps that must be skipped, a critic that is too slow, samples that collapse."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from trainer.micro_batch import MicroBatch
from utils.bounds import AT_LEAST_1, NOT_NEGATIVE, require
from utils.errors import UserError
from utils.files import atomic_write_text

log = logging.getLogger(__name__)


@dataclass
class HealthConfig:
    """The conditions for a warning and for the end of the run."""

    max_skipped: int = 10
    """This many skipped steps in a row end the run. A step is skipped if a loss or gradient is not finite."""
    window: int = 50
    """The alarms compare medians over this many steps. 0 turns the alarms off."""
    critic_rise: float = 1.5
    """The critic's loss may grow to this factor times its lowest median while the generator is trained."""
    variance_fall: float = 0.5
    """The variance within generated videos may fall to this share of its highest median."""

    def __post_init__(self) -> None:
        require(self, AT_LEAST_1, "max_skipped")
        require(self, NOT_NEGATIVE, "window")
        if not self.critic_rise > 1:
            raise ValueError(f"critic_rise={self.critic_rise} must be more than 1")
        if not 0 < self.variance_fall < 1:
            raise ValueError(f"variance_fall={self.variance_fall} must lie in (0, 1)")


@dataclass
class Alarm:
    """Compares the median of a metric over a window with the best earlier median. After a warning it starts again."""

    metric: str
    limit: float
    """Factor on the best median. Above 1: a larger median warns; below 1: a smaller one does."""
    advice: str
    best: float | None = None
    recent: list[float] = field(default_factory=list)

    def watch(self, step: int, value: float, window: int) -> None:
        """Note the metric of a step."""
        self.recent.append(value)
        if len(self.recent) < window:
            return
        now, self.recent = median(self.recent), []
        rising = self.limit > 1
        if self.best is not None and (now > self.limit * self.best if rising else now < self.limit * self.best):
            log.warning(
                "step %d: %s %s from %.3g to %.3g: %s",
                step, self.metric, "rose" if rising else "fell", self.best, now, self.advice,
            )  # fmt: skip
        self.best = now if self.best is None else (min if rising else max)(self.best, now)

    def restore(self, best: float | None, recent: list[float]) -> None:
        """Go on from an earlier best median and the metrics of the unfinished window."""
        self.best, self.recent = best, list(recent)


class Health:
    """Counts skipped steps and watches the metrics of a run. Its state is part of a checkpoint.

    Args:
        folder: the batches of skipped steps are recorded here.
    """

    def __init__(self, config: HealthConfig, folder: Path, *, is_main: bool) -> None:
        self.config = config
        self.folder = folder
        self.is_main = is_main
        self.skipped = 0
        self.in_a_row = 0
        self.alarms = [
            Alarm(
                "critic_loss",
                config.critic_rise,
                "the critic lags behind the generator; raise dmd.critic_updates or critic_optimizer.lr, "
                "or lower optimizer.lr",
            ),
            Alarm(
                "sample_variance",
                config.variance_fall,
                "the samples collapse; go back to an earlier checkpoint and lower optimizer.lr, "
                "or check dmd.real_guidance_scale",
            ),
        ]

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note a step that was not skipped, and warn if its metrics show trouble."""
        self.in_a_row = 0
        for alarm in self.alarms:
            if self.config.window and alarm.metric in metrics and "generator_loss" in metrics:  # the generator moves
                alarm.watch(step, metrics[alarm.metric], self.config.window)

    def step_skipped(self, step: int, batch: MicroBatch, prompts: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Count a step that was skipped, and record its batch. All processes call it.

        Args:
            batch: any part of the batch of the update that failed.
            prompts: the prompts of the whole batch. Only the main process needs them.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        self.skipped += 1
        self.in_a_row += 1
        path = self.folder / f"step_{step:08d}.json"
        if self.is_main:
            record = {"step": step, "seed": batch.seed, "samples": list(batch.batch), "prompts": list(prompts)}
            try:
                atomic_write_text(path, json.dumps(record | {"metrics": dict(metrics)}, indent=1) + "\n")
            except OSError as error:
                log.warning("the batch of the skipped step %d could not be recorded: %s", step, error.strerror or error)
            log.warning("step %d was skipped: a loss or gradient is not finite; its batch is in %s", step, path)
        if self.in_a_row >= self.config.max_skipped:
            raise UserError(
                f"{self.in_a_row} steps in a row were skipped, the last one {step}: their loss or gradient is not "
                f"finite. Their batches are in {self.folder}; lower optimizer.lr, or remove the newest checkpoints"
            )

    def state_dict(self) -> dict[str, object]:
        """Return the counts and the state of the alarms."""
        seen = {alarm.metric: [alarm.best, alarm.recent] for alarm in self.alarms}
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "seen": seen}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore the result of :meth:`state_dict`."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        for alarm in self.alarms:
            alarm.restore(*state["seen"][alarm.metric])
