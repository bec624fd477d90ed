"""Dataclass schemas, YAML values and command line overrides become one checked configuration object.

A schema is a dataclass; its fields may be `bool int float str Enum`, `X | None`, unions of scalars, `list[X]`,
`dict[str, X]`, another dataclass or `Dataclass | None`. Not `Literal`, `tuple` or a union with a container: omegaconf
2.3 cannot express them. A field without a default (or with omegaconf's MISSING) is mandatory. Enum members are written
by name or value in any case. A YAML file may start with `defaults: [base, ../other]`: files to merge before it.
"""

import copy
import difflib
import functools
import math
import os
import re
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from utils.checkout import find_shipped
from utils.errors import UserError
from utils.files import atomic_write_text
from utils.legacy_config import refuse_official_keys

T = TypeVar("T")
YAML_WORDS = {True: ("on", "yes", "true"), False: ("off", "no", "false")}
"""The words that YAML reads as a truth value."""

COMMAND_LINE = "command line"
INPUTS = frozenset(
    ["weights", "tokenizer", "data_path", "path", "switch_path", "embeddings", "sample_prompts", "pairs"]
)
"""The last parts of the keys that name files to read."""
NONE = ("null", "~")
"""How YAML writes None."""
PATHS = INPUTS | {"output_folder", "cache", "lora"}
"""The last parts of the keys that name files and folders."""
LEAST_INT, MOST_INT = -(2**63), 2**64 - 1
"""Whole numbers that PyTorch takes, as a size or as a seed."""
OVERRIDE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)=(.*)", re.DOTALL)


def load_config(
    schema: type[T],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    ignored: Collection[str] = (),
    inputs: Collection[str] = INPUTS,
) -> T:
    """Read `path` and its `defaults`, apply overrides such as `rollout.window=9`, and return an instance of `schema`.

    The file may also lie in the checkout, and so may the files that the keys `inputs` name; see `find_shipped`.
    The sections in `ignored` belong to another program. A file may have them; an override of them is refused.

    Raises UserError, in one line that names the source, the dotted key, the value and the nearest valid name; in one
    line a key for a file of the official code.
    """
    known = _field_hints(schema)
    layers = _read_layers(Path(find_shipped(str(path))), {*known, *ignored}, included_by=())
    layers = {
        source: {key: value for key, value in values.items() if key not in ignored} for source, values in layers.items()
    }
    for text in overrides:
        if text.partition("=")[0].partition(".")[0] in ignored:
            raise UserError(f"{COMMAND_LINE}: {text}: this key is for training and changes nothing here; leave it out")
    parsed = [(COMMAND_LINE, _parse_override(schema, text)) for text in overrides]
    for source, values in parsed:
        refuse_official_keys(values, known, source)
    source = f"{path} and the {COMMAND_LINE}" if overrides else str(path)
    config = _build(schema, [*layers.items(), *parsed], source)
    _find_inputs(config, inputs)
    return config


def from_dict(schema: type[T], values: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> T:
    """Build a configuration from the result of `to_dict`, with overrides as in `load_config`. Text is used literally.

    Raises UserError. It names `source`.
    """
    parsed = [(COMMAND_LINE, _parse_override(schema, text)) for text in overrides]
    return _build(schema, [(source, _literal(values)), *parsed], source)


def to_dict(config: Any) -> Any:
    """Convert a schema instance to dicts, lists and scalars (enums by name, paths as text), as JSON can hold them."""
    if is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    if isinstance(config, Enum):
        return config.name
    return str(config) if isinstance(config, Path) else config


def to_yaml(config: Any) -> str:
    """Convert a schema instance to YAML that `load_config` can read."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(to_dict(config))))


def save_config(config: Any, path: str | Path) -> None:
    """Write `to_yaml(config)` atomically."""
    atomic_write_text(path, to_yaml(config))


def _find_inputs(config: Any, names: Collection[str]) -> None:
    """Replace the paths of the fields `names`, at any depth, by those at which the files are."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            _find_inputs(value, names)
        elif field.name in names and isinstance(value, str):
            setattr(config, field.name, find_shipped(value))


def _read_layers(path: Path, known: Collection[str], included_by: tuple[Path, ...]) -> dict[str, dict]:
    """Return source name -> values, in merge order. A file that several others include is merged once, first."""
    path = Path(os.path.normpath(path))
    if path in included_by:
        raise UserError(f"{included_by[-1]}: defaults form a cycle: {' -> '.join(map(str, (*included_by, path)))}")
    values = _read_yaml(path)
    refuse_official_keys(values, known, path)  # before its defaults, which have another meaning in such a file
    defaults = values.pop("defaults", [])
    if not isinstance(defaults, list) or not all(isinstance(name, str) for name in defaults):
        raise UserError(f"{path}: defaults={_show(defaults)} is not a list of file names")
    layers: dict[str, dict] = {}
    for name in defaults:
        for source, inherited in _read_layers(_included_file(path, name), known, (*included_by, path)).items():
            layers.setdefault(source, inherited)
    return {**layers, str(path): values}


def _included_file(path: Path, name: str) -> Path:
    file = path.parent / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if not file.is_file():
        others = sorted(other.stem for other in file.parent.glob("*.yaml") if other.name != path.name)
        raise UserError(f"{path}: defaults: no file {file}{_did_you_mean(file.stem, others)}")
    return file


def _read_yaml(path: Path) -> dict:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except yaml.MarkedYAMLError as error:
        where = f" at line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        raise UserError(f"{path}: invalid YAML{where}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: invalid YAML: {_one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error
    except OSError as error:
        if error.strerror is None:  # raised by omegaconf: the file contains only a scalar
            raise UserError(f"{path}: holds no key: value pairs") from error
        similar = _did_you_mean(path.name, [other.name for other in path.parent.glob("*.yaml")])
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}{similar}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a list, not key: value pairs")
    return values


def _parse_override(schema: type, text: str) -> dict[str, Any]:
    """Parse `a.b=value` to {"a": {"b": value}}. The value is YAML. A text field takes text literally, also ${...}."""
    match = OVERRIDE.fullmatch(text)
    if match is None:
        raise UserError(f"{COMMAND_LINE}: {text!r} is not an override of the form section.key=value")
    key, raw = match.groups()
    if not raw.isascii() and any("\ud800" <= character <= "\udfff" for character in raw):
        raise UserError(f"{COMMAND_LINE}: {key}={raw!a}: is not text in UTF-8; rename the file that it names")
    hint = _hint_at(schema, key)
    is_text = _without_none(hint) is str
    text = _literal(raw) if is_text else raw
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        if not is_text:
            raise UserError(f"{COMMAND_LINE}: {key}={raw}: the value is not valid YAML") from error
        value = text
    is_none = value is None and hint is not str and raw.strip().lower() in NONE
    if is_text and not is_none and (not raw.strip() or value == text.strip() or not isinstance(value, str)):
        value = text
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _build(schema: type[T], layers: Sequence[tuple[str, Mapping[str, Any]]], source: str) -> T:
    config = _fresh(schema)
    known = _dotted_names(schema)
    for origin, values in layers:
        _merge(config, schema, values, origin, known)
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if not missing:
            return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # an interpolation ${...} that leads nowhere
        raise UserError(f"{source}: {error.full_key}: {_one_line(error)}") from error
    except ValueError as error:
        section = _failing_section(config)
        raise UserError(f"{source}: {section + ': ' if section else ''}{_one_line(error)}") from error
    raise UserError(f"{source}: no value for {', '.join(missing)}: set it in the file or with {missing[0]}=VALUE")


def _merge(
    config: DictConfig, schema: type, values: Mapping[str, Any], origin: str, known: Sequence[str], prefix: str = ""
) -> None:
    """Write `values` into `config` field by field, so that an error can name its key and value."""
    hints = _field_hints(schema)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise UserError(f"{origin}: unknown key {key}={_show(value)}{_did_you_mean(key, known)}")
        kind = _without_none(hints[name])
        if is_dataclass(kind) and isinstance(value, Mapping):
            if OmegaConf.is_missing(config, name) or config[name] is None:
                config[name] = _fresh(kind)
            _merge(config[name], kind, value, origin, known, prefix=f"{key}.")
            continue
        if name in PATHS and isinstance(value, str) and not value.strip():
            raise UserError(f"{origin}: {key} is empty; give a path, or leave it out")
        try:
            if kind is bool and not isinstance(value, bool | str | None):  # omegaconf would take any number
                raise TypeError
            with read_write(config):  # frozen dataclasses come read-only
                config.merge_with({name: _enum_member(kind, value)})
        except (OmegaConfBaseException, TypeError):
            raise UserError(f"{origin}: {key}={_show(value)} is not {_describe(hints[name], value)}") from None
        if OmegaConf.is_interpolation(config, name) or OmegaConf.is_missing(config, name):
            continue
        numbers = _numbers(config[name])
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise UserError(f"{origin}: {key}={_show(value)} must be finite; give a number")
        if not all(LEAST_INT <= number <= MOST_INT for number in numbers if isinstance(number, int)):
            raise UserError(f"{origin}: {key}={_show(value)} does not fit into 64 bits; give a smaller number")


def _numbers(value: Any) -> list[Any]:
    """Return a value, or the items of a list. Text has none."""
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _fresh(schema: type) -> DictConfig:
    """Return the configuration with the defaults of `schema`, in a tenth of the time of OmegaConf.structured."""
    return copy.deepcopy(_defaults(schema))


@functools.cache
def _defaults(schema: type) -> DictConfig:
    return OmegaConf.structured(schema)


def _literal(value: Any) -> Any:
    """Escape text for omegaconf, so that it replaces nothing: ${...} becomes \\${...}."""
    if isinstance(value, Mapping):
        return {key: _literal(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_literal(each) for each in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _enum_member(kind: Any, value: Any) -> Any:
    """Return the member of the enum `kind` whose name or value is `value` in any case. Other values are unchanged.

    YAML reads off, no, on and yes as truth values.
    """
    if not (isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str | bool)):
        return value
    words = YAML_WORDS[value] if isinstance(value, bool) else (value.casefold(),)
    matching = (m for m in kind if m.name.casefold() in words or str(m.value).casefold() in words)
    return next(matching, value)


def _failing_section(config: DictConfig, prefix: str = "") -> str:
    """Return the dotted name of the innermost section whose __post_init__ fails; "" is the whole configuration."""
    for name in config:
        if not OmegaConf.is_dict(config[name]) or OmegaConf.get_type(config[name]) is dict:
            continue
        try:
            OmegaConf.to_object(config[name])
        except ValueError:
            return _failing_section(config[name], prefix=f"{prefix}{name}.")
    return prefix.rstrip(".")


@functools.cache
def _field_hints(schema: type) -> dict[str, Any]:
    hints = get_type_hints(schema)
    return {field.name: hints[field.name] for field in fields(schema)}


def _hint_at(schema: Any, key: str) -> Any:
    """Return the type of the dotted `key`, or None if there is no such key."""
    for part in key.split("."):
        section = _without_none(schema)
        schema = _field_hints(section).get(part) if is_dataclass(section) else None
    return schema


def _without_none(hint: Any) -> Any:
    """`X | None` -> X; every other type unchanged."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
    return kinds[0] if len(kinds) == 1 else hint


def _dotted_names(schema: type, prefix: str = "") -> list[str]:
    names = []
    for name, hint in _field_hints(schema).items():
        names.append(prefix + name)
        if is_dataclass(section := _without_none(hint)):
            names += _dotted_names(section, f"{prefix}{name}.")
    return names


def _did_you_mean(name: str, valid: Sequence[str]) -> str:
    """Return a question with the nearest name, compared as a whole or by its last part; "" if none is near."""
    by_name = {candidate.casefold(): candidate for candidate in valid}
    by_last_part = {candidate.rpartition(".")[2]: by_name[candidate] for candidate in reversed(by_name)}
    for wanted, known in ((name.casefold(), by_name), (name.casefold().rpartition(".")[2], by_last_part)):
        if nearest := difflib.get_close_matches(wanted, known, n=1):
            return f"; did you mean {known[nearest[0]]}?"
    return ""


def _describe(hint: Any, value: Any) -> str:
    kind = _without_none(hint)
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = [member.name for member in kind]
        return f"one of {', '.join(names)}{_did_you_mean(str(value), names)}"
    if is_dataclass(kind):
        return f"a section with the keys {', '.join(_field_hints(kind))}"
    return f"of type {hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint}"


def _show(value: Any) -> str:
    text = _one_line(repr(value))
    return text if len(text) <= 100 else f"{text[:97]}..."


def _one_line(error: object) -> str:
    """Return the text of an error without omegaconf's `full_key` lines."""
    return " ".join(line.strip() for line in str(error).partition("\n    full_key:")[0].split("\n"))
