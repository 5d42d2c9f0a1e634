"""Texts to tokens with one tokenizer, where each text continues another.

Left out: chat templates (`chat`), what a response is (`rendering`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any

_ANCHORS = ("\n", ".", "0")
_PROBES = ("a", " a\n0", "A long-ish sentence, with “marks” and 12 numbers: naïve 日本 🙂")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of a text, and where they lie in it."""

    ids: list[int]
    places: Callable[[], list[int]]  # asked for rarely, and dear

    @property
    def ends(self) -> list[int]:
        """How many characters of the text each token and those before it cover."""
        return self.places()


class Encoder:
    """One tokenizer, fast or slow, of transformers; never adds special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.adds_bos = self.bos is not None and tokenizer("a")["input_ids"][:1] == [self.bos]
        self._knows_places = getattr(tokenizer, "is_fast", False)
        self._direct = self._directly()
        self._encode_tail = lru_cache(maxsize=16)(
            self.encode
        )  # what stands behind the last mark is mostly a call for an answer
        # SentencePiece-like tokenizers put a space in front of every text; a response must not gain one.
        self._adds_space = tokenizer.decode(self.encode("a") * 2, clean_up_tokenization_spaces=False) == "a a"

    def encode(self, text: str) -> list[int]:
        """Tokens of a text that begins a sequence."""
        if self._direct is not None:
            return self._direct.encode_batch_fast([text], add_special_tokens=False)[0].ids  # no places
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def sequence(self, first: str, others: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Tokens of a text that begins a sequence, and of texts that continue it, each read on its own (`alone`)."""
        if self._direct is None or self._adds_space:
            return self.encode(first), [self.alone(text).ids for text in others]
        own, *rest = self._direct.encode_batch_fast([first, *others], add_special_tokens=False)  # no places
        return own.ids, [encoding.ids for encoding in rest]

    def alone(self, text: str, cuts: Sequence[int] = ()) -> Tokens:
        """Tokens of a text that continues another, without the space that some tokenizers put in front.

        cuts: places in the text, ascending, whose tokens a caller will ask for. A slow tokenizer knows no places, so it
        reads the pieces between the cuts one by one.
        """
        return self.after("", [], text, cuts)

    def after(self, context: str, ids: list[int], part: str, cuts: Sequence[int] = ()) -> Tokens:
        """Tokens of a text that follows the context's, from both together where its own are a prefix of those."""
        if self._knows_places or not cuts:
            return self._follow(context, ids, part)
        whole: list[int] = []
        ends: list[int] = []
        for start, stop in pairwise([0, *(cut for cut in cuts if cut < len(part)), len(part)]):
            if start < stop:
                piece = self._follow(context if not start else "", ids if not start else [], part[start:stop])
                whole += piece.ids
                ends += [start + end for end in piece.ends]
        return Tokens(whole, lambda: ends)

    def each_after(self, context: str, ids: list[int], parts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts each of which follows the context's, as `after` has them."""
        if self._direct is None or not context:
            return [self.after(context, ids, part).ids for part in parts]
        together = self._direct.encode_batch_fast([context + part for part in parts], add_special_tokens=False)
        found = [encoding.ids for encoding in together]
        return [
            both[len(ids) :] if both[: len(ids)] == ids else self.after(context, ids, part).ids
            for both, part in zip(found, parts, strict=True)
        ]

    def places(self, text: str) -> list[int]:
        """Places in a text behind each of its tokens, ascending; of a slow tokenizer's, which knows none, evenly spaced ones."""
        tokens = self.alone(text)
        count = len(tokens.ids)
        return tokens.ends if self._knows_places else [len(text) * (i + 1) // count for i in range(count)]

    def context(self, text: str, ids: list[int]) -> tuple[str, list[int]]:
        """The end of a text from its last special token on: nothing before it changes the tokens that follow."""
        last = next((i for i in reversed(ids) if i in self.specials), None)
        start = text.rfind(self.tokenizer.convert_ids_to_tokens(last)) if last is not None else -1
        own = self._encode_tail(text[start:]) if start > 0 else ids
        return (text[start:], own) if start > 0 and own == ids[len(ids) - len(own) :] else (text, ids)

    @cached_property
    def specials(self) -> frozenset[int]:
        """Tokens that no text is made of."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return frozenset(self.tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    def _follow(self, context: str, ids: list[int], part: str) -> Tokens:
        if context:
            together = self._placed(context + part)
            if together.ids[: len(ids)] == ids:
                return _rest(together, len(ids), len(context))
        if self._adds_space:
            for anchor in _ANCHORS:
                before, both = self.encode(anchor), self._placed(anchor + part)
                if both.ids[: len(before)] == before:
                    return _rest(both, len(before), len(anchor))
        return self._placed(part)

    def _placed(self, text: str) -> Tokens:
        if self._direct is not None:
            encoding = self._direct.encode(text, add_special_tokens=False)
            return Tokens(encoding.ids, lambda: _ends(encoding))
        found = self.tokenizer(text, add_special_tokens=False, verbose=False)
        ids = list(found["input_ids"])
        if not self._knows_places:
            return Tokens(ids, lambda: [len(text)] * len(ids))
        return Tokens(ids, lambda: _ends(found.encodings[0]))

    def _directly(self) -> Any:
        """The Rust tokenizer below, where calling it without transformers between gives the same: half of the time."""
        if not self._knows_places:
            return None
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = getattr(self.tokenizer, "split_special_tokens", False)
        texts = [*_PROBES, *(f"a{token}b" for token in self.tokenizer.all_special_tokens)]
        wrapped = [list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]
        same = [backend.encode(text, add_special_tokens=False).ids for text in texts] == wrapped
        return backend if same else None


def _rest(tokens: Tokens, count: int, characters: int) -> Tokens:
    """What follows the first `count` tokens, which are those of as many `characters`."""
    return Tokens(tokens.ids[count:], lambda: [max(0, end - characters) for end in tokens.ends[count:]])


def _ends(encoding: Any) -> list[int]:
    """Several tokens of one character end where it does; an end never lies before an earlier one."""
    return list(accumulate((end for _, end in encoding.offsets), max))
