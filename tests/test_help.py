"""The help of every program: each option has a text and names its default."""

import argparse
import importlib
from pathlib import Path

import pytest

SCRIPTS = (Path(__file__).resolve().parents[1] / "scripts").glob("*.py")
PROGRAMS = [
    "demo",
    "inference",
    "train",
    *(f"scripts.{path.stem}" for path in SCRIPTS if "def main(" in path.read_text()),
]


class ParserFound(Exception):
    """Carries the parser of a program."""


def parser_of(program: str, monkeypatch) -> argparse.ArgumentParser:
    def stop(parser, *_):
        raise ParserFound(parser)

    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    with pytest.raises(ParserFound) as found:
        importlib.import_module(program).main([])
    return found.value.args[0]


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_each_option_has_a_text_and_names_its_default(program, monkeypatch):
    parser = parser_of(program, monkeypatch)
    assert parser.description
    for action in parser._actions:
        assert action.help, f"{program}: {action.dest} has no text"
        if not action.option_strings or action.dest == "help":
            continue
        text = f"{program} {action.option_strings[0]}: {action.help}"
        assert "default: " in action.help or "required" in action.help or action.required, text
        if action.default:  # a value that the parser fills in
            assert "default: %(default)s" in action.help, text
