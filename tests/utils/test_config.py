"""A configuration is either a checked dataclass instance or one line that says what to correct."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from utils.config import from_dict, load_config, save_config, to_dict, to_yaml
from utils.errors import UserError


class Mode(Enum):
    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"
    OFF = "off"


@dataclass
class Rollout:
    window: int | None = None
    sink: int = 0
    steps: list[int] = field(default_factory=lambda: [1000, 750, 500, 250])

    def __post_init__(self):
        if self.sink < 0:
            raise ValueError(f"sink={self.sink} must not be negative")


@dataclass
class Optimizer:
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])


@dataclass
class Config:
    name: str
    mode: Mode = Mode.CAUSAL
    compile: bool = False
    rollout: Rollout = field(default_factory=Rollout)
    optimizer: Optimizer = field(default_factory=Optimizer)
    critic: Optimizer | None = None
    limit: int | float | None = None
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.name == "forbidden":
            raise ValueError("name='forbidden' is taken")


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def error_line(path: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(Config, path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_yaml_values_and_overrides_make_real_dataclasses(write):
    path = write("name: a\nrollout:\n  window: 9\n  steps: [8, 4]\noptimizer: {lr: 1e-3, betas: [0, 1]}\n")
    config = load_config(Config, path, ["rollout.sink=2", "optimizer.lr=5e-5", "weights={a: 2}", "compile=true"])
    assert config == Config(
        "a", rollout=Rollout(9, 2, [8, 4]), optimizer=Optimizer(5e-5, [0.0, 1.0]), weights={"a": 2.0}, compile=True
    )
    assert isinstance(config.optimizer.betas[0], float)


@pytest.mark.parametrize("text", ["BIDIRECTIONAL", "bidirectional", "Bidirectional"])
def test_enum_members_are_read_by_name_or_value_in_any_case(write, text):
    assert load_config(Config, write(f"name: a\nmode: {text}\n")).mode is Mode.BIDIRECTIONAL


def test_off_is_a_member_of_an_enum_although_yaml_reads_it_as_a_truth_value(write):
    assert load_config(Config, write("name: a\nmode: off\n")).mode is Mode.OFF
    assert load_config(Config, write("name: a\n"), ["mode=off"]).mode is Mode.OFF
    with pytest.raises(UserError, match="mode"):
        load_config(Config, write("name: a\nmode: on\n"))


@pytest.mark.parametrize("text", ["1e-3", "a: b", "[unclosed", "no", "x=y", "7", "", "it's"])
def test_a_text_override_is_taken_as_it_stands(write, text):
    """In a text field, a value stays text even if YAML would read it as a number, a list or null."""
    assert load_config(Config, write(""), [f"name={text}"]).name == text


def test_optional_values_and_sections_can_be_set_and_unset(write):
    path = write("name: a\ncritic: {lr: 1.0}\nrollout: {window: 5}\nlimit: 0.5\n")
    config = load_config(Config, path)
    assert (config.critic, config.rollout.window, config.limit) == (Optimizer(lr=1.0), 5, 0.5)
    config = load_config(Config, path, ["critic=null", "rollout.window=null", "limit=3"])
    assert (config.critic, config.rollout.window, config.limit) == (None, None, 3)


def test_defaults_merge_first_to_last_and_recursively(write):
    write("name: root\noptimizer: {lr: 1.0, betas: [0, 0]}\nlimit: 1\n", "root.yaml")
    write("defaults: [../root]\noptimizer: {lr: 2.0}\n", "sub/left.yaml")
    write("defaults: [../root.yaml]\nlimit: 2\n", "sub/right.yaml")
    config = load_config(Config, write("defaults: [left, right]\nname: top\n", "sub/run.yaml"))
    assert (config.name, config.optimizer, config.limit) == ("top", Optimizer(2.0, [0.0, 0.0]), 2)


def test_saved_configuration_reads_back_equal(write, tmp_path):
    config = load_config(Config, write("name: '1e-3'\ncritic: {lr: 1e-5}\nmode: bidirectional\nlimit: 2\n"))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Config, tmp_path / "saved.yaml") == config
    assert from_dict(Config, to_dict(config), source="checkpoint") == config
    assert to_dict(config)["mode"] == "BIDIRECTIONAL" and type(to_dict(config)["rollout"]) is dict
    assert to_yaml(config) == (tmp_path / "saved.yaml").read_text()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.windw=9", "unknown key rollout.windw=9; did you mean rollout.window?"),
        ("window=9", "unknown key window=9; did you mean rollout.window?"),
        ("rolout.window=9", "unknown key rolout={'window': 9}; did you mean rollout?"),
        ("critic.lrr=1", "unknown key critic.lrr=1; did you mean critic.lr?"),
        ("zzzzzz=1", "unknown key zzzzzz=1"),
        ("rollout.window=nine", "rollout.window='nine' is not of type int | None"),
        ("rollout.sink=1.5", "rollout.sink=1.5 is not of type int"),
        (
            "rollout.sink=99999999999999999999",
            "rollout.sink=99999999999999999999 does not fit into 64 bits; give a smaller number",
        ),
        (
            "rollout.steps=[4,-9223372036854775809]",
            "rollout.steps=[4, -9223372036854775809] does not fit into 64 bits; give a smaller number",
        ),
        ("rollout.sink=null", "rollout.sink=None is not of type int"),
        ("rollout.steps=4", "rollout.steps=4 is not of type list[int]"),
        ("rollout.steps=[1,x]", "rollout.steps=[1, 'x'] is not of type list[int]"),
        ("rollout=4", "rollout=4 is not a section with the keys window, sink, steps"),
        ("rollout.sink.x=4", "rollout.sink={'x': 4} is not of type int"),
        ("compile=3", "compile=3 is not of type bool"),
        ("mode=cusal", "mode='cusal' is not one of CAUSAL, BIDIRECTIONAL, OFF; did you mean CAUSAL?"),
        ("rollout.window", "'rollout.window' is not an override of the form section.key=value"),
        ("=3", "'=3' is not an override of the form section.key=value"),
        ("--rollout.window=3", "'--rollout.window=3' is not an override of the form section.key=value"),
        ("rollout..window=3", "'rollout..window=3' is not an override of the form section.key=value"),
        ("rollout.steps=[1", "rollout.steps=[1: the value is not valid YAML"),
    ],
)
def test_a_bad_override_is_one_line_that_names_the_mistake(write, override, expected):
    assert error_line(write("name: a\n"), override) == f"command line: {expected}"


def test_a_bad_value_in_a_file_names_that_file(write):
    write("optimizer: {lrate: 1}\n", "base.yaml")
    path = write("defaults: [base]\nname: a\n")
    assert error_line(path) == f"{path.parent / 'base.yaml'}: unknown key optimizer.lrate=1; did you mean optimizer.lr?"
    path = write("name: a\noptimizer: {lr: fast}\n", "other.yaml")
    assert error_line(path) == f"{path}: optimizer.lr='fast' is not of type float"


def test_a_mandatory_value_must_be_given(write):
    path = write("rollout: {sink: 1}\n")
    assert error_line(path) == f"{path}: no value for name: set it in the file or with name=VALUE"


def test_values_that_a_section_refuses_name_the_section(write):
    path = write("name: a\nrollout: {sink: -1}\n")
    assert error_line(path) == f"{path}: rollout: sink=-1 must not be negative"
    assert error_line(path, "rollout.sink=-2") == (
        f"{path} and the command line: rollout: sink=-2 must not be negative"
    )
    path = write("name: forbidden\n")
    assert error_line(path) == f"{path}: name='forbidden' is taken"
    with pytest.raises(UserError, match=r"^model\.pt: rollout: sink=-1 must not be negative$"):
        from_dict(Config, {"name": "a", "rollout": {"sink": -1}}, source="model.pt")


def test_unreadable_files_are_one_line(write, tmp_path):
    path = write("name: [a\nrollout: {}\n")
    assert error_line(path).startswith(f"{path}: invalid YAML at line 2")
    assert error_line(write("name: a\nname: b\n")).startswith(f"{path}: invalid YAML at line 2")
    assert error_line(write("- a\n")) == f"{path}: holds a list, not key: value pairs"
    assert error_line(write("5")) == f"{path}: holds no key: value pairs"
    assert error_line(tmp_path / "rum.yaml") == (
        f"{tmp_path / 'rum.yaml'}: cannot read the configuration: No such file or directory; did you mean run.yaml?"
    )
    assert "Is a directory" in error_line(tmp_path)
    path.write_bytes(b"\xff\xfe\x00name")
    assert str(path) in error_line(path)


def test_wrong_defaults_are_one_line(write):
    path = write("defaults: [bsae]\n")
    write("name: a\n", "base.yaml")
    assert error_line(path) == f"{path}: defaults: no file {path.parent / 'bsae.yaml'}; did you mean base?"
    path = write("defaults: base\n")
    assert error_line(path) == f"{path}: defaults='base' is not a list of file names"
    first, second = write("defaults: [b]\n", "a.yaml"), write("defaults: [a]\n", "b.yaml")
    assert error_line(first) == f"{second}: defaults form a cycle: {first} -> {second} -> {first}"


@pytest.mark.parametrize(
    "text", ["out/${x}", "a${b", "${oc.env:HOME}", "a\\${x}", "$${a}", "${a:${b}}", "}${", "a: ${b}"]
)
def test_a_text_from_the_command_line_stays_as_it_is_and_reads_back(write, text):
    config = load_config(Config, write("name: a\n"), [f"name={text}"])
    assert config.name == text
    assert load_config(Config, write(to_yaml(config), "again.yaml")) == config
    assert from_dict(Config, to_dict(config), "dict") == config


def test_an_interpolation_that_leads_nowhere_is_one_line(write):
    assert "Interpolation key 'nothing' not found" in error_line(write("name: ${nothing}\n"))


@pytest.mark.parametrize("text", ["${HOME}/x", "a${b}", "\\${c}", "${", "$x", "}{", "\\\\${d:e}", " ", " a "])
def test_a_text_of_the_command_line_is_taken_as_it_stands_and_reads_back(write, tmp_path, text):
    config = load_config(Config, write("name: a\n"), [f"name={text}"])
    assert config.name == text
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Config, tmp_path / "saved.yaml") == config == from_dict(Config, to_dict(config), "checkpoint")
