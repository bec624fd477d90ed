"""Regular expressions that come from a file: only those whose matching time is short for every text."""

import re

from utils.errors import UserError

MAX_LENGTH = 512
MAX_REPEATS = 4
_ESCAPED = re.compile(r"\\.")
_CLASS = re.compile(r"\[\^?\]?[^\]]*\]")
_REPEAT = re.compile(r"[*+]|\{\d*,?\d*\}")


def check_pattern(pattern: str, source: str) -> str:
    """Return `pattern` if matching it takes short time for every text of a prompt's or a name's length.

    A group that repeats, such as `(a+)+`, can take exponential time; each repeated part adds a factor of the text's
    length. So groups must not repeat, and at most 4 parts may.

    Args:
        pattern: a regular expression of Python, or of the tokenizers library.
        source: names the file in errors.

    Raises:
        UserError: the pattern is longer than 512 characters or could take long.
    """
    bare = _CLASS.sub("c", _ESCAPED.sub("e", pattern))
    shown = pattern if len(pattern) <= 60 else f"{pattern[:60]}..."
    if len(pattern) > MAX_LENGTH:
        raise UserError(f"{source}: the pattern {shown!r} has more than {MAX_LENGTH} characters; refused")
    if re.search(r"\)[*+{]", bare) or len(_REPEAT.findall(bare)) > MAX_REPEATS:
        raise UserError(f"{source}: the pattern {shown!r} could take very long to match; refused")
    return pattern


def compile_pattern(pattern: str, source: str) -> re.Pattern:
    """Compile a checked pattern. Raises UserError also if it is not a regular expression."""
    try:
        return re.compile(check_pattern(pattern, source))
    except re.error as error:
        raise UserError(f"{source}: {pattern[:60]!r} is not a regular expression ({error}); correct it") from None
