"""Finds the final answer in a response: its last box, or the sentence that states it."""

import re

# An escaped character (\{ and \} do not open or close a group), the start of a box, or a brace of a group.
_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_STATED = re.compile(
    r"(?:\banswer|\b(?:correct|right|best)\s+(?:option|choice)|\u7b54\u6848)[\s*]*"
    r"(?:(?:is|was|(?:would|should|must)\s+be)(?![A-Za-z])|[\u662f\u4e3a]|[:=\uff1a])[\s*:]*",
    re.IGNORECASE,
)
_NEXT_SENTENCE = re.compile(r"(?:(?<=[^\W\d_]{3})|(?<=[)\]}$*\d]))\.\s+(?=[A-Z])")


def last_box(text: str) -> str | None:
    """Content of the last \\boxed{...} with balanced braces, or None if there is none."""
    opened: list[re.Match[str]] = []
    start, content = -1, None
    for token in _TOKEN.finditer(text):
        if token.group()[-1] == "{" and len(token.group()) != 2:
            opened.append(token)
        elif token.group() == "}" and opened:
            box = opened.pop()
            if len(box.group()) > 1 and box.start() > start:
                start, content = box.start(), text[box.end() : token.start()]
    return content


def stated_answer(text: str) -> str | None:
    """What follows the last "answer is" or "Answer:" of its sentence; None if nothing does."""
    stated = None
    for line in text.splitlines():
        for match in _STATED.finditer(line):
            stated = line[match.end() :]
    if stated is None:
        return None
    return _NEXT_SENTENCE.split(stated)[0].strip().strip("*").strip() or None
