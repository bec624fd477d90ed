"""Every number of the configuration is checked before anything heavy loads: it is finite and within its bounds."""

import math
from collections.abc import Iterator
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import get_args

import pytest

from tests.shapes_parts import REPOSITORY
from trainer.config import Config
from utils.bounds import BOUNDS, require
from utils.config import _field_hints, _without_none, from_dict, load_config
from utils.errors import UserError

MAY_BE_NEGATIVE = {
    "lora_scale": "a LoRA can be taken off",
    "guidance_scale": "guidance away from the prompt",
    "real_guidance_scale": "guidance away from the prompt",
    "fake_guidance_scale": "guidance away from the prompt",
    "seed": "any whole number is a seed",
    "alpha": "SiD's weight (LoRA's must be positive)",
}


def numbers(schema: type, prefix: str = "") -> Iterator[tuple[str, type, str, type]]:
    """Yield (dotted key, its section, its name there, its type: int, float or a list)."""
    for name, hint in _field_hints(schema).items():
        kind = _without_none(hint)
        if is_dataclass(kind):
            yield from numbers(kind, f"{prefix}{name}.")
        elif kind in (int, float) or float in get_args(kind):
            yield prefix + name, schema, name, kind


NUMBERS = list(numbers(Config))
KEYS = [key for key, *_ in NUMBERS]


def refused(schema: type, name: str, value: object) -> str:
    """Return the line that refuses a value."""
    with pytest.raises(UserError) as caught:
        from_dict(schema, {name: value}, "here")
    message = str(caught.value)
    assert name in message and "\n" not in message
    return message


def test_the_walk_finds_the_numbers_of_every_section():
    assert len(KEYS) > 60 and {"optimizer.lr", "rollout.context_noise", "gan.heads.registers"} <= set(KEYS)


@pytest.mark.parametrize(("key", "schema", "name", "kind"), NUMBERS, ids=KEYS)
def test_a_number_that_is_not_finite_or_negative_is_refused_in_one_line_that_names_it(key, schema, name, kind):
    for value in (math.nan, math.inf, -math.inf, "nan"):
        message = refused(schema, name, value if kind in (int, float) else [value])
        assert "must be finite" in message or "is not of type" in message
    if name not in MAY_BE_NEGATIVE:
        refused(schema, name, -1 if kind in (int, float) else [-1.0, -2.0])


ZERO_MEANS_NOTHING = (
    "optimizer.lr",
    "critic_optimizer.clip_norm",
    "generator.shift",
    "student.shift",
    "diffusion.timestep_shift",
    "lora.alpha",
    "trainer.batch_size",
    "gan.perturbation_sigma",
)


@pytest.mark.parametrize(
    ("schema", "name"), [(schema, name) for key, schema, name, _ in NUMBERS if key in ZERO_MEANS_NOTHING]
)
def test_zero_is_refused_if_it_means_nothing(schema, name):
    assert f"{name}=0" in refused(schema, name, 0)


BAD_OVERRIDES = ("optimizer.lr=nan", "optimizer.lr=-1", "generator.shift=0", "optimizer.betas=[.inf,0]")


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_the_command_line_names_the_key(override):
    with pytest.raises(UserError) as caught:
        load_config(Config, REPOSITORY / "configs" / "shapes" / "base.yaml", [override])
    section, _, name = override.partition("=")[0].partition(".")
    assert section in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("bound", BOUNDS)
def test_nan_is_within_no_bound(bound):
    with pytest.raises(ValueError, match="number=nan must"):
        require(SimpleNamespace(number=math.nan), bound, "number")
