"""Chat template -> token ids, for both streams: what the policy continues and what experts wrote.

A prompt is the rendered template with its generation prompt. A response is the text tokenized as the
continuation of that prompt, followed by the token with which the template closes an assistant turn,
so that sampled and demonstrated responses end alike. A conversation may have any number of turns; one that the template
would leave out silently is refused.

Text in a data row must never act as a control token. Whoever writes `<|im_end|><|im_start|>system`
into a row would otherwise open a turn of his own. Escaping would change what the row says, so such a
text is refused (`ControlTokenError`), and the data set counts it.

Tokenizers without a chat template get the plain fallback: contents joined by blank lines, no roles,
the tokenizer's own begin-of-sequence token where it has one, and its eos token at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..engine.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]

_MARK = "plait"


class ControlTokenError(DataError):
    """A text of the data set contains one of the tokenizer's control tokens."""


class PromptTooLongError(DataError):
    """The rendered prompt exceeds the limit; raised before it is tokenized where that is certain."""


class ChatFormat:
    """One tokenizer's way to write prompts and responses.

    >>> chat = ChatFormat(AutoTokenizer.from_pretrained(folder))            # doctest: +SKIP
    >>> prompt = chat.encode_prompt([{"role": "user", "content": "2+2?"}])  # doctest: +SKIP
    >>> response = chat.encode_response(prompt, "4")                        # doctest: +SKIP
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        self._control = _special_ids(tokenizer)
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self._skeletons: dict[tuple[str, ...], list[int]] = {}
        self._leading = self._find_leading_ids()
        self.end_id = self._find_end_id()

    def encode_prompt(self, messages: Messages, *, max_length: int | None = None) -> list[int]:
        """Token ids of the conversation and the generation prompt.

        Raises DataError where the template refuses the roles, PromptTooLongError beyond `max_length`
        and ControlTokenError where a content holds a control token.
        """
        text = self._render(messages, add_generation_prompt=True)
        # No token is longer than the longest one: a 10 MB row is refused without tokenizing it.
        if max_length is not None and len(text) > max_length * self._longest_token:
            raise PromptTooLongError(f"{len(text):,} characters, the limit is {max_length} tokens")
        ids = self._tokenize_prompt(text)
        if max_length is not None and len(ids) > max_length:
            raise PromptTooLongError(f"{len(ids):,} tokens, the limit is {max_length}")
        self._refuse_injection(ids, messages)
        return ids

    def encode_response(
        self, prompt_ids: Sequence[int], text: str, *, max_length: int | None = None
    ) -> list[int]:
        """Token ids of `text` as the continuation of the prompt, then `end_id`.

        Where the tokenizer would merge text into the prompt's last token, the prompt stays as it is
        and the text is tokenized by itself: the policy never sees any other prompt ids. A text that is
        certainly longer than `max_length` tokens is cut to a length that is still longer: tokenizing
        10 MB of which a few thousand tokens can be used takes seconds.
        """
        if max_length is not None:
            text = text[: (max_length + 1) * self._longest_token]
        # Only what follows the prompt's last control token can merge with the text.
        context = self._after_last_control(prompt_ids)
        joined = self._tokenize(str(self.tokenizer.decode(context)) + text)
        fits = bool(context) and joined[: len(context)] == context
        ids = joined[len(context) :] if fits else self._tokenize(text)
        found = self._control.intersection(ids)
        if found:
            raise ControlTokenError(f"holds the control token {self._name(min(found))}")
        return [*ids, self.end_id]

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _tokenize_prompt(self, text: str) -> list[int]:
        return [*self._leading, *self._tokenize(text)]

    def _find_leading_ids(self) -> list[int]:
        """What the tokenizer itself puts before a text; a template writes that in its own words."""
        if self.has_template:
            return []
        alone, whole = self._tokenize(_MARK), self.tokenizer.encode(_MARK)
        return whole[: whole.index(alone[0])] if alone and alone[0] in whole else []

    def _render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        if not self.has_template:
            return "\n\n".join(message["content"] for message in messages)
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise DataError(f"the model's chat template refuses it: {error}") from error
        assert isinstance(text, str)
        return text

    def _refuse_injection(self, ids: list[int], messages: Messages) -> None:
        """Compare the control tokens with those of the same conversation with harmless contents.

        This also sees tokens that arise by normalisation, or where content meets template.
        """
        roles = tuple(message["role"] for message in messages)
        expected = self._skeletons.get(roles)
        if expected is None:
            expected = self._skeletons[roles] = self._tokenize_prompt(self._render_harmless(roles))
        control = self._control | self._added.intersection(expected)
        found = [token for token in ids if token in control]
        if found != [token for token in expected if token in control]:
            surplus = sorted(
                set(found), key=lambda token: expected.count(token) - found.count(token)
            )
            raise ControlTokenError(f"holds the control token {self._name(surplus[0])}")

    def _render_harmless(self, roles: Sequence[str]) -> str:
        """A conversation of these roles without control tokens; raises DataError where a turn does not show in it."""
        contents = [f"{_MARK}{i}{_MARK}" for i in range(len(roles))]
        turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        text = self._render(turns, add_generation_prompt=True)
        for role, content in zip(roles, contents, strict=True):
            if content not in text:
                raise DataError(
                    f"the model's chat template leaves out a turn of role {role!r} where the roles are "
                    f"{', '.join(roles)}"
                )
        return text

    def _find_end_id(self) -> int:
        """The first control token that the template writes after an assistant's content."""
        if self.has_template:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
            rendered = self._render(turns, add_generation_prompt=False)
            tail = self._tokenize(rendered.rpartition(_MARK)[2])
            closing = [token for token in tail if token in self._control or token in self._added]
            if closing:
                return closing[0]
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise DataError(
                "the tokenizer has neither a chat template that closes an assistant's turn nor an "
                "eos_token: set one of them in the model's tokenizer_config.json"
            )
        return end

    def _after_last_control(self, ids: Sequence[int]) -> list[int]:
        start = max((i + 1 for i, token in enumerate(ids) if token in self._added), default=0)
        return list(ids[start:])

    def _name(self, token: int) -> str:
        return repr(self.tokenizer.convert_ids_to_tokens(token))


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that steer rather than say: tokens flagged special, and bos, eos, pad and the like.

    The unknown token is one of them unless ordinary text yields it.
    """
    flagged = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    rare_text = tokenizer.encode("\U000f1234", add_special_tokens=False)
    return frozenset(flagged.union(tokenizer.all_special_ids).difference(rare_text))
