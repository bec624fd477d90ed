"""Skipped steps are counted and recorded, and too many end the run. Warnings name a lagging critic and collapse."""

import json
import logging

import pytest

from trainer.health import Health, HealthConfig
from trainer.micro_batch import MicroBatch
from utils.errors import UserError

BATCH = MicroBatch(seed=5, batch=range(8, 12), number=0, start=2, size=2)


def health(folder, **options) -> Health:
    return Health(HealthConfig(**options), folder, is_main=True)


def skip(watcher: Health, step: int) -> None:
    watcher.step_skipped(step, BATCH, ["a cat", "a dog"], {"loss": float("nan")})


def feed(watcher: Health, metric: str, values: list[float], **others: float) -> None:
    for step, value in enumerate(values, start=1):
        watcher.step_done(step, {"generator_loss": 1.0, metric: value, **others})


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_a_skipped_step_is_counted_and_its_batch_recorded(tmp_path, caplog):
    watcher = health(tmp_path / "skipped")
    skip(watcher, 3)
    assert watcher.skipped == watcher.in_a_row == 1
    record = json.loads((tmp_path / "skipped" / "step_00000003.json").read_text())
    assert record["seed"] == 5 and record["samples"] == [8, 9, 10, 11] and record["prompts"] == ["a cat", "a dog"]
    assert "step 3 was skipped" in caplog.text
    watcher.step_done(4, {})
    assert watcher.skipped == 1 and watcher.in_a_row == 0


def test_too_many_in_a_row_end_the_run_in_one_line(tmp_path):
    watcher = health(tmp_path, max_skipped=3)
    for step in (1, 2):
        skip(watcher, step)
    watcher.step_done(3, {})
    for step in (4, 5):
        skip(watcher, step)
    with pytest.raises(UserError, match="3 steps in a row were skipped, the last one 6") as error:
        skip(watcher, 6)
    assert "\n" not in str(error.value) and "optimizer.lr" in str(error.value)


def test_a_batch_that_cannot_be_recorded_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    skip(health(tmp_path / "file"), 1)
    assert "could not be recorded" in caplog.text


def test_a_rising_critic_and_falling_variance_are_told_with_advice(tmp_path, caplog):
    watcher = health(tmp_path, window=5)
    feed(watcher, "critic_loss", [1.0] * 5 + [1.4] * 5, sample_variance=1.0)
    assert warnings(caplog) == []
    feed(watcher, "critic_loss", [1.6] * 5, sample_variance=0.4)
    lag, collapse = warnings(caplog)
    assert "critic_loss rose from 1 to 1.6" in lag and "dmd.critic_updates" in lag
    assert "sample_variance fell from 1 to 0.4" in collapse and "optimizer.lr" in collapse


def test_single_outliers_a_resting_generator_and_a_falling_critic_are_no_alarm(tmp_path, caplog):
    watcher = health(tmp_path, window=5)
    feed(watcher, "critic_loss", [1.0, 1.0, 900.0, 1.0, 900.0] * 4)
    feed(watcher, "critic_loss", [1.0, 0.5, 0.1, 0.01, 0.001] * 4)
    for step in range(20):
        watcher.step_done(step, {"critic_loss": 9.0**step})
    feed(health(tmp_path, window=0), "critic_loss", [9.0**step for step in range(20)])
    assert warnings(caplog) == []


def test_a_resumed_watch_goes_on_as_if_it_had_not_stopped(tmp_path, caplog):
    first, second = health(tmp_path, window=5), health(tmp_path, window=5)
    feed(first, "critic_loss", [1.0] * 5 + [2.0] * 4)
    skip(first, 10)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict() and second.skipped == 1
    feed(second, "critic_loss", [2.0])
    assert "critic_loss rose" in warnings(caplog)[-1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_skipped": 0}, "max_skipped=0"),
        ({"window": -1}, "window=-1"),
        ({"critic_rise": 1}, "critic_rise=1"),
        ({"variance_fall": 1}, "variance_fall=1"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        HealthConfig(**values)
