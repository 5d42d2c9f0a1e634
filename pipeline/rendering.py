"""From a `Record` to token ids: chat template, special tokens, truncation.

The prompt's tokens are a true prefix in front of every response, and they are what generation is fed. For that, plain
texts are tokenised on their own, prompt and response: tokenised together, letters on both sides of the border may
become one token that differs from response to response. Of chat records the response is what the whole templated
conversation holds after the prompt, where that is possible, else the response's text and the template's end of turn.

Every sequence has one BOS, if the tokenizer uses one, and each response one end: EOS, or the special token with which
the chat template ends a turn; what a template writes after it (a line feed, mostly) is dropped.

Left out: reading records (`layouts`), writing rows (`data`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.config import ConfigError, DataConfig
from pipeline.contracts import Message, Record

_PROBE = "qalignprobe"
"""A word that no template changes: shows what a template writes around an answer."""

_ANCHORS = ("\n", ".", "0")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A record as tokens: each response follows the same prompt."""

    prompt_ids: list[int]  # [P]
    response_ids: list[list[int]]  # K × [R_k], best first
    prompt_tokens_cut: int
    responses_cut: int
    text: str  # prompt and best response as the tokenizer read them, before truncation
    trained: list[list[bool]] | None = None  # K × [R_k]: False on the environment's tokens; None: nowhere
    token_rewards: list[list[float]] | None = None  # K × [R_k]; None: the kind has no rewards
    behaviour_logprobs: list[float | None] | None = None  # K: log μ(response), nats; None: nowhere


class Renderer:
    """Turns records into tokens with one tokenizer and one `DataConfig`.

    tokenizer: fast or slow, of transformers. Raises `ConfigError` if `append_eos` or `chat_template` cannot work.
    """

    def __init__(self, tokenizer: Any, data: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.data = data
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        if self.eos is None and data.append_eos:
            raise ConfigError("data.append_eos: the tokenizer has no EOS token; set it to false")
        self._adds_bos = self.bos is not None and tokenizer("a")["input_ids"][:1] == [self.bos]
        # SentencePiece-like tokenizers put a space in front of every text; a response must not gain one.
        self._adds_space = tokenizer.decode(self._encode("a") * 2, clean_up_tokenization_spaces=False) == "a a"
        if data.chat_template is not None:
            try:
                _ = self._turn_end
            except ValueError as error:
                raise ConfigError(f"data.chat_template: {error}; correct the template") from None

    def prompt_ids(self, prompt: str | list[Message], room: int = 1) -> list[int]:
        """Tokens of a prompt, [P], cut as a record's whose longest response has `room` tokens.

        Generation passes the most tokens that it will add. Raises ValueError if nothing fits, or there is no token.
        """
        return self._cut_prompt(self._begun(self._encode(self._prompt_text(prompt))), prompt, room)

    def __call__(self, record: Record) -> Rendered:
        """Tokens of a record, truncated. Raises ValueError with a short reason if it cannot be trained on."""
        chat = not isinstance(record.prompt, str)
        prompt_text = self._prompt_text(record.prompt)
        own = self._encode(prompt_text)
        parts = [self._chat_part(record.prompt, prompt_text, text) if chat else text for text in record.ranked]
        context = self._context(prompt_text, own) if chat else None
        bodies = [self._after(*context, part) if context else self._alone(part) for part in parts]
        responses = [self._ended(body, chat) for body in bodies]
        whole = self._begun(own)
        prompt = self._cut_prompt(whole, record.prompt, max(map(len, responses)))
        room = self.data.max_length - len(prompt)
        cut = [response[:room] for response in responses]
        responses_cut = sum(len(response) > room for response in responses)
        if len(set(map(tuple, cut))) < len(cut):
            raise ValueError(f"responses are equal after {'truncation' if responses_cut else 'tokenisation'}")
        return Rendered(prompt, cut, len(whole) - len(prompt), responses_cut, prompt_text + parts[0])

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens at which generation has to stop: EOS and, with a chat template, the token that ends a turn."""
        ends = {self.eos} if self.eos is not None else set()
        if self.data.chat_template or self.tokenizer.chat_template:
            ends |= set(self._turn_end_ids[:1])
        return frozenset(ends)

    # ------------------------------------------------------------------------------------------ tokenizer

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _alone(self, text: str) -> list[int]:
        """Tokens of a text that continues another, without the space that some tokenizers put in front."""
        if self._adds_space:
            for anchor in _ANCHORS:
                before, both = self._encode(anchor), self._encode(anchor + text)
                if both[: len(before)] == before:
                    return both[len(before) :]
        return self._encode(text)

    # --------------------------------------------------------------------------------------------- prompt

    def _prompt_text(self, prompt: str | list[Message]) -> str:
        return prompt if isinstance(prompt, str) else self._template(_turns(prompt), generate=True) + self._opening

    def _begun(self, ids: list[int]) -> list[int]:
        """The same tokens behind exactly one BOS if the tokenizer uses one; at least one token."""
        own = next((i for i, token in enumerate(ids) if token != self.bos), len(ids))
        if not ids and self.bos is None:
            raise ValueError("empty prompt: the tokenizer has no BOS token to start from; give a prompt")
        return [self.bos, *ids[own:]] if self._adds_bos or own or not ids else ids

    def _cut_prompt(self, ids: list[int], prompt: str | list[Message], room: int) -> list[int]:
        """Cut from the left behind what has to stay, so that `room` tokens of response fit if that is possible."""
        limit = self.data.max_prompt_length or self.data.max_length - 1
        wanted = min(limit, max(self.data.max_length - room, 1))
        if len(ids) <= wanted:
            return ids
        head, tail = self._frame(ids, prompt)
        kept = max(wanted, min(len(ids), head + tail))
        if kept > limit:
            if self.data.max_prompt_length is None:
                raise ValueError("nothing left of the response within max_length: system text and template fill it")
            raise ValueError("nothing left of the prompt within max_prompt_length: system text and template fill it")
        return ids[:head] + ids[len(ids) - (kept - head) :]

    def _frame(self, ids: list[int], prompt: str | list[Message]) -> tuple[int, int]:
        """How many tokens stay at the beginning, and at the end.

        BOS and the last token; of a chat, what the template writes before the first user's words (the system text
        above all) and after the last ones (the call for an answer): what prompts of other words have in common with it.
        """
        if isinstance(prompt, str):
            return int(ids[0] == self.bos), 1
        before = prompt[:1] if prompt[0].role == "system" else []
        texts = [self._prompt_text([*before, Message(role="user", content=word)]) for word in ("0", "x")]
        alike = [ids, *(self._begun(self._encode(text)) for text in texts)]
        return _shared(alike), max(1, _shared([tokens[::-1] for tokens in alike]))

    # ------------------------------------------------------------------------------------------- response

    def _chat_part(self, prompt: list[Message], prompt_text: str, response: str) -> str:
        """The text that follows the prompt's in the whole conversation, up to the end of the turn."""
        whole = self._template([*_turns(prompt), _turn("assistant", response)], generate=False)
        written, end = self._turn_end
        if whole.startswith(prompt_text) and whole.endswith(written):
            body = whole[len(prompt_text) : len(whole) - len(written)]
            if response.strip() in body:
                return body + end
        return response + end

    def _context(self, text: str, ids: list[int]) -> tuple[str, list[int]]:
        """The end of a prompt from its last special token on: nothing before it changes the tokens that follow."""
        last = next((i for i in reversed(ids) if i in self._specials), None)
        start = text.rfind(self.tokenizer.convert_ids_to_tokens(last)) if last is not None else -1
        own = self._encode(text[start:]) if start > 0 else ids
        return (text[start:], own) if start > 0 and own == ids[len(ids) - len(own) :] else (text, ids)

    def _after(self, context: str, ids: list[int], part: str) -> list[int]:
        """Tokens of a text that follows the context's, from both together where its own are a prefix of those."""
        together = self._encode(context + part)
        return together[len(ids) :] if together[: len(ids)] == ids else self._alone(part)

    def _ended(self, ids: list[int], chat: bool) -> list[int]:
        """A response with its end, once. Special tokens of sequences inside it would end or begin another."""
        end = self._turn_end_ids if chat else []
        body, closing = (ids[: -len(end)], end) if end and ids[-len(end) :] == end else (ids, [])
        if not closing and self.eos is not None and body[-1:] == [self.eos]:
            body, closing = body[:-1], [self.eos]
        if not closing and self.data.append_eos:
            closing = [self.eos]
        if not body:
            raise ValueError("empty response: the tokenizer makes no token of it")
        if {self.bos, self.eos, *closing[:1]} & set(body):
            raise ValueError("a response contains BOS, EOS or the end of a turn")
        return body + closing

    # ------------------------------------------------------------------------------------------- template

    @cached_property
    def _opening(self) -> str:
        """What a template without generation prompt writes before an answer: it belongs to the prompt."""
        asked = self._template([_turn("user", "x")], generate=True)
        if asked != self._template([_turn("user", "x")], generate=False):
            return ""
        whole = self._template([_turn("user", "x"), _turn("assistant", _PROBE)], generate=False)
        opening = whole[len(asked) : whole.rindex(_PROBE)] if whole.startswith(asked) and _PROBE in whole else ""
        return opening if opening.strip() else ""

    @cached_property
    def _turn_end(self) -> tuple[str, str]:
        """What the template writes after an answer, and how much of it belongs to the response."""
        text = self._template([_turn("user", "x"), _turn("assistant", _PROBE)], generate=False)
        if _PROBE not in text:
            raise ValueError("the chat template leaves out the assistant's words")
        written = text[text.rindex(_PROBE) + len(_PROBE) :]
        return written, written.rstrip()

    @cached_property
    def _turn_end_ids(self) -> list[int]:
        """Tokens with which a response of a chat ends, when the first of them is a special one; else none."""
        ids = self._alone(self._turn_end[1])
        return ids if ids[:1] and ids[0] in self._specials else []

    @cached_property
    def _specials(self) -> frozenset[int]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return frozenset(self.tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    def _template(self, turns: list[dict[str, str]], generate: bool) -> str:
        from jinja2 import TemplateError

        if self.data.chat_template is None and not self.tokenizer.chat_template:
            raise ValueError("no chat template: the tokenizer has none; set data.chat_template")
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.data.chat_template, tokenize=False, add_generation_prompt=generate
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from None


def _turns(messages: list[Message]) -> list[dict[str, str]]:
    return [_turn(message.role, message.content) for message in messages]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _shared(sequences: list[list[int]]) -> int:
    """Length of the longest common prefix."""
    return next(
        (i for i, tokens in enumerate(zip(*sequences, strict=False)) if len(set(tokens)) > 1), min(map(len, sequences))
    )
