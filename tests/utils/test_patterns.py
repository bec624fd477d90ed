"""A regular expression from a file matches in a short time, or it is refused."""

import re
import time

import pytest

from utils.errors import UserError
from utils.patterns import check_pattern, compile_pattern

ACCEPTED = [
    " {2,}",
    r"\s+",
    r"blocks\.\d+\.(attn1|attn2)\.to_q",
    r"'s|'t|'re| ?[a-z]+| ?[0-9]+",
    "^x$",
    "a*?",
    "[*+?(]+",
    r"\(\*\)\+",
    "(?:ab|cd)?e*",
    "a|b|c|d|e|f|g",
    "",
]
REFUSED = [
    "(a+)+$",
    "(a*)*b",
    "(a|aa)+$",
    "(?:a|a){2,}b",
    "(a?){30}a",
    "a?" * 30 + "a" * 30,
    ".*.*.*x",
    r"(a)\1",
    r"(?<n>a)\k<n>",
    r"\g<0>",
    "(?P<n>a)",
    "(?#comment)",
    "(?(1)a|b)",
    "x" * 513,
]


@pytest.mark.parametrize("pattern", ACCEPTED)
def test_an_accepted_pattern_is_quick_on_texts_that_are_made_to_be_slow(pattern):
    check_pattern(pattern, "tokenizer.json")
    texts = ["a" * 4000 + "!", " " * 4000 + "!", "ab" * 2000 + "!", "blocks.1." * 400]
    start = time.process_time()
    for text in texts:
        re.sub(pattern, "", text)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("pattern", REFUSED)
def test_a_pattern_that_could_be_slow_is_refused(pattern):
    with pytest.raises(UserError, match="refused") as error:
        check_pattern(pattern, "tokenizer.json")
    assert len(str(error.value)) < 200


def test_names_allow_two_repeats_and_a_pattern_must_be_one():
    assert compile_pattern(".*attn.*", "adapter_config.json").fullmatch("blocks.0.self_attn.q")
    with pytest.raises(UserError, match=r"'blocks\[' is not a regular expression"):
        compile_pattern("blocks[", "adapter_config.json")
