"""Checks regular expressions from a file: only those are accepted that match in a short time for every text."""

import re

from utils.errors import UserError

MAX_LENGTH = 512
MAX_OPTIONAL = 4
_ESCAPED = re.compile(r"\\(?P<kind>[gk1-9])|\\.", re.DOTALL)
_CLASS = re.compile(r"\[\^?\]?[^\]]*\]")
_GROUP = re.compile(r"\(\?(:|i:|i\)|=|!|<=|<!)")
_REPEAT = re.compile(r"[*+]|\{\d*,?\d*\}")


def check_pattern(pattern: str, source: str, *, max_repeats: int = 1) -> str:
    """Return `pattern` if matching it takes a short time for every text.

    Three things make matching slow. A group that repeats, such as `(a+)+`, can take exponential time, and so can
    references to other groups: both are refused. Every other repeated part adds a factor of the text's length, and
    every optional part a factor of two: their number is limited in each alternative.

    Args:
        pattern: a regular expression of Python, or of the tokenizers library.
        source: names the file in errors.
        max_repeats: how many parts may repeat. 1 suits texts of some thousand characters, 2 suits names.

    Raises:
        UserError: the pattern is longer than 512 characters or could take long.
    """
    shown = pattern if len(pattern) <= 60 else f"{pattern[:60]}..."
    if len(pattern) > MAX_LENGTH:
        raise UserError(f"{source}: the pattern {shown!r} has more than {MAX_LENGTH} characters; refused")
    refers = any(match["kind"] for match in _ESCAPED.finditer(pattern))
    bare = _GROUP.sub("(", _CLASS.sub("c", _ESCAPED.sub("e", pattern)))
    bare = re.sub(r"([*+?}])\?", r"\1", bare)  # lazy repeats
    slow = any(len(_REPEAT.findall(part)) > max_repeats or part.count("?") > MAX_OPTIONAL for part in bare.split("|"))
    if refers or slow or re.search(r"\)[*+{]|\(\?", bare):
        raise UserError(f"{source}: the pattern {shown!r} could take very long to match; refused")
    return pattern


def compile_pattern(pattern: str, source: str, *, max_repeats: int = 2) -> re.Pattern:
    """Compile a checked pattern for names. Raises UserError also if it is not a regular expression."""
    try:
        return re.compile(check_pattern(pattern, source, max_repeats=max_repeats))
    except re.error as error:
        raise UserError(f"{source}: {pattern[:60]!r} is not a regular expression ({error}); correct it") from None
