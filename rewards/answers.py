"""Finding the final answer in a completion; shared by the built-in rewards."""

import re
import textwrap
from collections.abc import Collection

_BRACES = re.compile(r"(?P<boxed>\\+boxed\s*\{)|\\.|[{}]", re.DOTALL)
_FENCE = re.compile(r"[ \t]*```[ \t]*([^\s`]*)[ \t]*")
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


def last_tagged(text: str) -> str | None:
    """Stripped content of the last <answer>...</answer>, or None; a tag that is not closed is passed over."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return None if start < 0 else text[start + len("<answer>") : end].strip()


def last_block(text: str, languages: Collection[str]) -> str | None:
    """Content of the last closed Markdown block fenced by ``` whose language is one of `languages`, or None.

    A fence stands alone on its line. One that names a language inside an open block starts a new block, so that a
    block left open hides none of the later ones. Linear in the length of `text`.
    """
    found: tuple[int, int] | None = None
    start: tuple[int, str] | None = None  # the open block's first line and language
    lines = text.splitlines()
    for i, line in enumerate(lines):
        fence = _FENCE.fullmatch(line)
        if fence is None:
            continue
        if start is None or fence[1]:
            start = (i + 1, fence[1].casefold())
            continue
        if start[1] in languages:
            found = (start[0], i)
        start = None
    return None if found is None else textwrap.dedent("\n".join(lines[found[0] : found[1]]))
