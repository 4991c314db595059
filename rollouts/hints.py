"""A prompt with a hint in its user's turn: the beginning of a solution, shown rather than forced."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..engine.types import Prompt, TokenIds
from .chat import ChatFormat, ControlTokenError, PromptTooLongError


@dataclass(frozen=True)
class HintDisplay:
    """`template` holds {prompt}, the text of the last user message, and {hint}."""

    chat: ChatFormat
    template: str
    max_prompt_length: int

    def __call__(self, prompt: Prompt, hint: TokenIds) -> Prompt | None:
        """The prompt, under its own id, with the text of `hint` in its last user message.

        None where it would exceed `max_prompt_length`, or the template and the hint's end make a control token.
        """
        text = str(self.chat.tokenizer.decode(list(hint))).rstrip("\ufffd")  # half a character
        last = max(i for i, message in enumerate(prompt.messages) if message["role"] == "user")
        values = {"{prompt}": prompt.messages[last]["content"], "{hint}": text}
        content = re.sub(r"\{(?:prompt|hint)\}", lambda match: values[match[0]], self.template)
        turns = [dict(message) for message in prompt.messages]
        turns[last]["content"] = content
        try:
            ids = self.chat.encode_prompt(turns, max_length=self.max_prompt_length)
        except (PromptTooLongError, ControlTokenError):
            return None
        return replace(prompt, messages=tuple(turns), token_ids=tuple(ids))
