"""docs/objectives.md names the source of every value in configs/*.yaml, and every key of the schema has a text."""

import ast
import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from trainer.config import Config
from trainer.self_forcing import METHODS

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "objectives.md").read_text(encoding="utf-8")
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
SHAPES = sorted((REPOSITORY / "configs" / "shapes").glob("*.yaml"))
LOCAL = {"defaults", "inference.output_folder"}
SOURCE = re.compile(
    r"ours|not public|arXiv \d{4}\.\d{5}|AdamW's default|`[\w-]+/[\w.-]+` on the( Hugging Face)? hub"
    r"|`(SF|LL|CF|CV|KR|WAN) [\w./-]+\.(yaml:\d+|py|md|yaml)"
)


def shown(value: object) -> str:
    """Return a value as the page writes it."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    text = text.removesuffix("\n...\n").strip()
    return text if len(text) <= 60 else f"{text[:57]}..."


def own_values(text: str) -> dict[str, str]:
    """Return dotted key -> value for the keys that a YAML file itself sets."""

    def flat(values: dict, prefix: str):
        for key, value in values.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, shown(value))]

    return {key: value for key, value in flat(yaml.safe_load(text), "") if key not in LOCAL}


def table(name: str) -> dict[str, tuple[str, str]]:
    """Return dotted key -> value and source from the table of a configuration."""
    section = PAGE.partition(f"### `configs/{name}.yaml`\n")[2].partition("\n### ")[0]
    return {
        key: (value, source)
        for key, value, source in re.findall(r"^\| `([\w.]+)` \| `(.+?)` \| (.+) \|$", section, re.M)
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_table_of_a_configuration_has_its_values(path):
    assert {key: value for key, (value, _) in table(path.stem).items()} == own_values(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_value_names_its_source(path):
    for key, (_, source) in table(path.stem).items():
        assert SOURCE.match(source), (key, source)


def test_a_value_that_changes_without_its_row_is_noticed():
    path = REPOSITORY / "configs" / "self_forcing_dmd.yaml"
    changed = path.read_text(encoding="utf-8").replace("lr: 4.0e-7", "lr: 5.0e-7")
    listed = {key: value for key, (value, _) in table(path.stem).items()}
    different = {key for key, value in own_values(changed).items() if listed[key] != value}
    assert different == {"critic_optimizer.lr"}


def test_the_page_lists_every_method_and_every_configuration_of_the_shapes_world():
    assert all(f"| `{objective.value}` |" in PAGE for objective in METHODS)
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert {path.stem for path in SHAPES} - {"base"} <= named


def schemas(schema: type, prefix: str = "") -> dict[str, type]:
    """Return dotted section -> dataclass for a schema and all its sections."""
    found = {prefix: schema}
    for field in fields(schema):
        hint = get_type_hints(schema)[field.name]
        for part in (hint, *getattr(hint, "__args__", ())):
            if is_dataclass(part):
                found |= schemas(part, f"{prefix}{field.name}.")
    return found


@pytest.mark.parametrize(("prefix", "schema"), schemas(Config).items(), ids=lambda value: str(value))
def test_every_key_has_a_text(prefix, schema):
    """Each field has a docstring. For a section, the docstring of its dataclass counts."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(schema))).body[0].body
    pairs = zip(body, [*body[1:], None], strict=True)
    for node, following in pairs:
        if isinstance(node, ast.AnnAssign):
            text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert text or f"{prefix}{node.target.id}." in schemas(Config), f"{prefix}{node.target.id}"
