"""Finding the final answer in a completion; shared by the built-in rewards."""

import re

_BRACES = re.compile(r"(?P<boxed>\\+boxed\s*\{)|\\.|[{}]", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}")


def last_boxed(text: str) -> str | None:
    r"""Content of the \boxed{...} that opens last and is closed, or None. Linear in the length of `text`.

    Escaped braces do not count, and an unclosed box (a truncated completion) is passed over.

    >>> last_boxed(r"so \boxed{1}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    found = (-1, -1)
    openers: list[int | None] = []  # where a box's content starts; None for an ordinary brace
    for match in _BRACES.finditer(text):
        if match["boxed"]:
            openers.append(match.end())
        elif match[0] == "{":
            openers.append(None)
        elif match[0] == "}" and openers:
            start = openers.pop()
            if start is not None and start > found[0]:
                found = (start, match.start())
    return None if found[0] < 0 else text[found[0] : found[1]]


def plain(content: str) -> str:
    r"""Stripped `content`, without a \text{...}, \mathrm{...} or \textbf{...} that spans all of it."""
    content = content.strip()
    match = _TEXT.fullmatch(content)
    return match[1].strip() if match else content
