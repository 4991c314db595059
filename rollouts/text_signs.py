"""What the text of a demonstration gives away: that it is cut off, written in another chat template, or empty."""

from __future__ import annotations

import re
import unicodedata

TAGS = ("think", "answer", "solution")
TEMPLATE_MARKUP = re.compile(
    r"<\|[a-z][a-z0-9_]{1,30}\|>"  # ChatML, Llama 3, Phi, Granite: <|im_start|>, <|eot_id|>
    "|<\uff5c[^\uff5c\\n]{1,40}\uff5c>"  # DeepSeek
    r"|\[/?INST\]|<</?SYS>>"  # Llama 2, Mistral
    r"|<(?:start|end)_of_turn>"  # Gemma
    r"|^#{2,3} ?(?:Assistant|Human|User|Instruction|Response|System) ?:"  # Alpaca and kin
    r"|(?:\A|\n\n)(?:Human|USER|Assistant|ASSISTANT): ",  # Vicuna and kin
    re.MULTILINE,
)
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_FENCE = re.compile(r"^ {0,3}```", re.MULTILINE)


def is_invisible(text: str) -> bool:
    """Nothing but white space, control characters and zero-width ones."""
    return all(unicodedata.category(c)[0] in "CZ" for c in text)


def unfinished_part(text: str) -> str | None:
    r"""What `text` opens and never closes, of \boxed{, a code fence, and the tags in TAGS; None where nothing.

    >>> unfinished_part(r"so \boxed{\frac{1}"), unfinished_part(r"so \boxed{1}, or \{")
    ('\\boxed{', None)
    """
    start = text.rfind("\\boxed{")
    if start >= 0 and not _closes(text, start + len("\\boxed{")):
        return "\\boxed{"
    if len(_FENCE.findall(text)) % 2:
        return "```"
    for tag in TAGS:
        if text.rfind(f"<{tag}>") > text.rfind(f"</{tag}>"):
            return f"<{tag}>"
    return None


def _closes(text: str, start: int) -> bool:
    depth = 1
    for match in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth:
            return True
    return False


def template_markup(text: str) -> str | None:
    """The first piece of `text` that is the markup of some chat template."""
    match = TEMPLATE_MARKUP.search(text)
    return match and match[0].strip()
