"""Extracts the requested text from the answer of a chat model, without its thoughts and remarks."""

import re

# How models mark what they think before they answer: opening and closing mark.
_TAG = r"(?:[\w:]*(?:think|thought|reason|reflect|scratchpad|analy[sz])\w*)"
THOUGHTS = (
    (r"<\|channel\|>\s*(?:analysis|commentary)[^<]*<\|message\|>", r"<\|channel\|>\s*final[^<]*<\|message\|>"),
    (rf"<{_TAG}>", rf"</{_TAG}>"),
    (rf"\[{_TAG}\]", rf"\[/{_TAG}\]"),
    (rf"◁{_TAG}▷", rf"◁/{_TAG}▷"),
    (rf"<\|(?:START_|begin_of_){_TAG}\|>", rf"<\|(?:END_|end_of_){_TAG}\|>"),
)
FRAME_MARK = re.compile(
    r"<\|(?:return|end|im_end|eot_id|(?:START|END)_RESPONSE|(?:begin|end)_of_solution)\|>|</?(?:answer|response|output)>",
    re.IGNORECASE,
)
MARK = re.compile(rf"<\|[^|]*\|>|</?{_TAG}|```|\[/?{_TAG}\]|◁", re.IGNORECASE)
FENCE = re.compile(r"```[\w-]*\n?(.*?)```", re.DOTALL)
HEADING = re.compile(r"\s*(?:#|-{3,}\s*$)")
QUOTES = re.compile(r"[\"“'](.*)[\"”']")
AGREEMENT = r"(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|great|gladly|no problem)"
SUBJECT = r"(?:prompt|description|paragraph|version|rewrite|expansion|answer|output)"
GREETING = re.compile(rf"{AGREEMENT}(?:,? (?:i|here|let|happy)\b[^.!:\n]{{0,60}})?[.!]\s*", re.IGNORECASE)
INTRODUCTION = re.compile(
    rf"(?:{AGREEMENT}\s*,?\s*)?"
    rf"(?:(?:here(?:'s|’s| is| are)|this is|below is)\b[^:\n]{{0,80}}\b{SUBJECT}\b[^:\n]{{0,80}}:"
    rf"|here (?:you go|it is)\s*[:.!]|(?:\w+ ){{0,4}}{SUBJECT}\s*:)\s*",
    re.IGNORECASE,
)
REMARK = re.compile(
    r"(?:let me know|i hope|feel free|would you like|if you(?:'d| would) like|note\s*:|\(?\s*(?:word count|\d+ words))",
    re.IGNORECASE,
)


def clean_answer(answer: str) -> str:
    """Return the text in an answer as one line, without thoughts, remarks, code fences, quotation marks or bold type.

    Raises:
        ValueError: nothing is left, or the rest still contains a mark of the model's own format.
    """
    text = answer
    for opening, closing in THOUGHTS:
        text = re.sub(rf"{opening}.*?{closing}", "", text, flags=re.DOTALL | re.IGNORECASE)
        text = re.split(closing, text, flags=re.IGNORECASE)[-1]  # an answer may contain only the closing mark
        text = re.split(opening, text, flags=re.IGNORECASE)[0]  # a thought without an end
    text = FENCE.sub(r"\n\n\1\n\n", FRAME_MARK.sub("", text)).replace("**", "")
    paragraphs = (_without_remarks(paragraph) for paragraph in re.split(r"\n\s*\n", text))
    text = " ".join(" ".join(paragraphs).split())
    if quoted := QUOTES.fullmatch(text):
        text = quoted[1].strip()
    if not text:
        raise ValueError("the model answered with no text")
    if MARK.search(text):
        raise ValueError(f"the answer holds a mark of the model's own format: {text[:200]}")
    return text


def _without_remarks(paragraph: str) -> str:
    """Return a paragraph without what the model says about its answer, such as "Sure! Here is the prompt:"."""
    text = "\n".join(line for line in paragraph.split("\n") if not HEADING.match(line)).strip()
    for remark in (GREETING, INTRODUCTION):
        if found := remark.match(text):
            text = text[found.end() :].strip()
    return "" if REMARK.match(text) else text
