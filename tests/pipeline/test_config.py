"""A YAML file serves training and inference: each program reads its own part of it."""

from dataclasses import fields
from pathlib import Path

import pytest

from pipeline.config import TRAINING_SECTIONS, PipelineConfig, load_pipeline_config
from trainer.config import Config
from utils.config import load_config
from utils.errors import UserError

CONFIGS = sorted(Path("configs").rglob("*.yaml"))


def test_the_training_sections_are_what_training_adds():
    names = [{field.name for field in fields(schema)} for schema in (Config, PipelineConfig)]
    assert names[0] - names[1] == TRAINING_SECTIONS


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_inference_reads_the_values_that_training_reads(path):
    whole, part = load_config(Config, path), load_pipeline_config(path)
    for field in fields(PipelineConfig):
        assert getattr(whole, field.name) == getattr(part, field.name)


@pytest.mark.parametrize("override", ["trainer.steps=3", "dmd.critic_updates=1", "objective=causvid"])
def test_an_override_that_only_training_uses_is_refused(override):
    with pytest.raises(UserError, match="is for training"):
        load_pipeline_config(CONFIGS[0], [override])


def test_a_misspelt_section_is_still_found(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("rolout: {window: 9}\n")
    with pytest.raises(UserError, match="did you mean rollout"):
        load_pipeline_config(path)
