r"""Reward `format`: 1 when the whole completion has the wanted form, else 0; a shaping part beside a verifier.

The default form: optional white space, one <think>...</think>, and behind it an answer that holds a \boxed{...} or an
<answer>...</answer> with something inside. A second think tag anywhere makes it 0, and so does text before the first.
Whether the answer is right is no matter here, and the prompt's answer is not read.

Option `pattern`: a regular expression of Python's `re` in its place. It must match the whole completion, `.` matches
newlines too, and flags are set inside it: `(?i)...`. Give `(?:<think>)?.*</think>...` where the chat template already
opens the thought in the prompt. A pattern that backtracks without end is stopped by the reward's deadline: UNKNOWN.
"""

import re
from functools import lru_cache

from ..engine.types import Prompt, Score

DEFAULT_PATTERN = (
    r"\s*<think>(?>(?:(?!</?think>).)*)</think>(?!.*</?think>)"
    r"(?:(?>(?:(?!\\boxed\{).)*)\\boxed\{\s*+(?!\}).*\}.*"
    r"|(?>(?:(?!<answer>).)*)<answer>\s*+(?!</answer>).*</answer>.*)"
)
"""Linear in the length of the completion: what stands before a tag is matched once and never tried again."""


def grade_format(prompt: Prompt, completion: str, *, pattern: str = DEFAULT_PATTERN) -> Score:
    """Score 1.0 or 0.0. ValueError where `pattern` is no regular expression."""
    return Score.ok(_compile(pattern).fullmatch(completion) is not None)


@lru_cache(maxsize=64)
def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"option pattern = {pattern!r} is no regular expression: {error}; "
            "try it with `python -c 'import re; re.compile(...)'`"
        ) from error
