"""From a `Record` to token ids: chat template, special tokens, truncation.

The prompt's tokens are a true prefix in front of every response, and they are what generation is fed. For that, plain
texts are tokenised on their own, prompt and response: tokenised together, letters on both sides of the border may
become one token that differs from response to response. Of chat records the response is what the whole templated
conversation holds after the prompt, where that is possible, else the response's text and the template's end of turn.
What does not fit is cut: prompts first (`truncation`), then responses on the right. Trajectories are never cut: one that does
not fit is refused.

Every sequence has one BOS, if the tokenizer uses one, and each response one end: EOS, or the special token with which
the chat template ends a turn; what a template writes after it (a line feed, mostly) is dropped.

Left out: reading records (`layouts`), steps of trajectories (`steps`), writing rows (`data`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.chat import Chat
from pipeline.config import ConfigError, DataConfig
from pipeline.records import Dialogue, Message, Record, Trajectories, Trajectory, Unpaired, said
from pipeline.steps import dialogue, last_tokens, plain
from pipeline.tokens import Encoder
from pipeline.truncation import Cutter


@dataclass(frozen=True, slots=True)
class Rendered:
    """A record as tokens: each response follows the same prompt."""

    prompt_ids: list[int]  # [P]
    response_ids: list[list[int]]  # K × [R_k], best first
    prompt_tokens_cut: int
    responses_cut: int
    text: str  # prompt and best response as the tokenizer read them, before truncation
    trained: list[list[bool]] | None = None  # K × [R_k]: False on the environment's tokens; None: all are the policy's
    token_rewards: list[list[float]] | None = None  # K × [R_k]; None: the kind has no rewards
    behaviour_logprobs: list[float | None] | None = None  # K: log μ(response), nats; None: nowhere
    step_ends: list[list[int]] | None = None  # K × steps: the token with which each ends; None: no trajectories

    @property
    def policy_steps(self) -> int:
        """Steps of the best response that the policy wrote; 0 where there are no trajectories."""
        ends = self.step_ends[0] if self.step_ends else []
        return sum(self.trained is None or self.trained[0][end] for end in ends)


@dataclass(frozen=True, slots=True)
class _Rollout:
    """A trajectory as tokens."""

    ids: list[int]
    trained: list[bool]
    rewards: list[float]
    step_ends: list[int]
    text: str


class Renderer:
    """Turns records into tokens with one tokenizer and one `DataConfig`.

    tokenizer: fast or slow, of transformers. Raises `ConfigError` if `append_eos` or `chat_template` cannot work.
    """

    def __init__(self, tokenizer: Any, data: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.data = data
        self.encoder = Encoder(tokenizer)
        self.chat = Chat(tokenizer, data.chat_template)
        self.bos, self.eos = self.encoder.bos, self.encoder.eos
        if self.eos is None and data.append_eos:
            raise ConfigError("data.append_eos: the tokenizer has no EOS token; set it to false")
        if data.chat_template is not None:
            try:
                _ = self.chat.turn_end
            except ValueError as error:
                raise ConfigError(f"data.chat_template: {error}; correct the template") from None

    def prompt_ids(self, prompt: str | Sequence[Message], room: int = 1) -> list[int]:
        """Tokens of a prompt, [P], cut as a record's whose longest response has `room` tokens.

        Generation passes the most tokens that it will add. Raises ValueError if nothing fits, or there is no token.
        """
        prompt = prompt if isinstance(prompt, str) else Dialogue.of(prompt)
        return self._cutter.cut(prompt, self._written(prompt), [room])[1]

    def __call__(self, record: Record) -> Rendered:
        """Tokens of a record, truncated. Raises ValueError with a short reason if it cannot be trained on."""
        if isinstance(record, Trajectories):
            return self._trajectories(record)
        text, whole, responses = self._answered(record.prompt, record.ranked)
        kept, prompt = self._cutter.cut(record.prompt, whole, [len(response) for response in responses])
        if kept is not record.prompt:  # the template may write an answer otherwise behind fewer turns
            _, prompt, responses = self._answered(kept, record.ranked)
        room = self.data.max_length - len(prompt)
        cut = [response[:room] for response in responses]
        responses_cut = sum(len(response) > room for response in responses)
        if len(set(map(tuple, cut))) < len(cut):
            raise ValueError(f"responses are equal after {'truncation' if responses_cut else 'tokenisation'}")
        lost = len(whole) - len(prompt)
        return Rendered(prompt, cut, lost, responses_cut, text, token_rewards=_label(record, cut))

    def _answered(
        self, prompt: str | Dialogue, answers: Sequence[str | Message]
    ) -> tuple[str, list[int], list[list[int]]]:
        """Text of a prompt and its first answer; tokens of the prompt, [P], and of each answer, K × [R_k]; nothing is cut."""
        text, chat = self._prompt_text(prompt), not isinstance(prompt, str)
        if chat:
            own = self.encoder.encode(text)
            parts = [self.chat.answer(prompt, text, answer) for answer in answers]
            context = self.encoder.context(text, own)
            bodies = self.encoder.each_after(*context, parts)
        else:
            parts = [said(answer) for answer in answers]
            own, bodies = self.encoder.sequence(text, parts)
        return text + parts[0], self._begun(own), [self._ended(body, chat) for body in bodies]

    def _trajectories(self, record: Trajectories) -> Rendered:
        ways = record.best_first
        text, whole, rollouts = self._rolled_out(record.prompt, ways)
        kept, prompt = self._cutter.cut(record.prompt, whole, [len(rollout.ids) for rollout in rollouts], whole=True)
        if kept is not record.prompt:
            _, prompt, rollouts = self._rolled_out(kept, ways)
        if len(prompt) + max(len(rollout.ids) for rollout in rollouts) > self.data.max_length:
            raise ValueError("a trajectory does not fit max_length")
        logged = [way.behaviour_logprob for way in ways]
        authored = not all(all(rollout.trained) for rollout in rollouts)
        return Rendered(
            prompt_ids=prompt,
            response_ids=[rollout.ids for rollout in rollouts],
            prompt_tokens_cut=len(whole) - len(prompt),
            responses_cut=0,
            text=text,
            trained=[rollout.trained for rollout in rollouts] if authored else None,
            token_rewards=[rollout.rewards for rollout in rollouts],
            behaviour_logprobs=logged if any(value is not None for value in logged) else None,
            step_ends=[rollout.step_ends for rollout in rollouts],
        )

    def _rolled_out(self, prompt: str | Dialogue, ways: Sequence[Trajectory]) -> tuple[str, list[int], list[_Rollout]]:
        """Text of a prompt and its first trajectory; tokens of the prompt, [P], and of each trajectory."""
        text = self._prompt_text(prompt)
        own = self.encoder.encode(text)
        rollouts = [self._rollout(prompt, text, own, way) for way in ways]
        return text + rollouts[0].text, self._begun(own), rollouts

    def _rollout(self, prompt: str | Dialogue, text: str, ids: list[int], way: Trajectory) -> _Rollout:
        """One trajectory behind a prompt that is `text` and, as tokens, `ids`."""
        chat = not isinstance(prompt, str)
        segments = plain(way) if isinstance(prompt, str) else dialogue(self.chat, prompt, text, way)
        found = _Rollout([], [], [], [], "".join(segment.text for segment in segments))
        for segment in segments:
            # Never across a border of authors: the policy's tokens are those of its own text.
            context = self.encoder.context(text, ids + found.ids) if chat else ("", [])
            tokens = self.encoder.after(*context, segment.text, segment.ends)
            if not tokens.ids:
                raise ValueError("empty step: the tokenizer makes no token of it")
            own = tokens.ids
            if segment.policy:
                own = self._ended(own, chat, last=segment is segments[-1])
            elif not chat and {self.bos, self.eos} & set(own):
                raise ValueError("a step of the environment contains BOS or EOS")
            start = len(found.ids)
            found.ids.extend(own)
            found.trained.extend([segment.policy] * len(own))
            found.rewards.extend([0.0] * len(own))
            for token, reward in zip(last_tokens(segment, tokens.ends), segment.rewards, strict=True):
                found.rewards[start + token] += reward
                found.step_ends.append(start + token)
            text += segment.text
        found.rewards[-1] += way.reward
        return found

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens at which generation has to stop: EOS and, with a chat template, the token that ends a turn."""
        ends = {self.eos} if self.eos is not None else set()
        if self.chat.exists:
            ends |= set(self._turn_end_ids[:1])
        return frozenset(ends)

    # --------------------------------------------------------------------------------------------- prompt

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self.data, self.encoder, self._written, self.bos)

    def _written(self, prompt: str | Dialogue) -> list[int]:
        """Tokens of a whole prompt, [P]."""
        return self._begun(self.encoder.encode(self._prompt_text(prompt)))

    def _prompt_text(self, prompt: str | Dialogue) -> str:
        if not isinstance(prompt, str):
            return self.chat.prompt(prompt)
        return (self.data.prompt_template or "{prompt}").replace("{prompt}", prompt)

    def _begun(self, ids: list[int]) -> list[int]:
        """The same tokens behind exactly one BOS if the tokenizer uses one; at least one token."""
        own = next((i for i, token in enumerate(ids) if token != self.bos), len(ids))
        if not ids and self.bos is None:
            raise ValueError("empty prompt: the tokenizer has no BOS token to start from; give a prompt")
        return [self.bos, *ids[own:]] if self.encoder.adds_bos or own or not ids else ids

    # ------------------------------------------------------------------------------------------- response

    def _ended(self, ids: list[int], chat: bool, last: bool = True) -> list[int]:
        """A response with its end, once. Special tokens of sequences inside it would end or begin another.

        last: no turn of another follows, so that the sequence ends as well.
        """
        end = self._turn_end_ids if chat else []
        body, closing = (ids[: -len(end)], end) if end and ids[-len(end) :] == end else (ids, [])
        if not closing and chat and body[-1:] and body[-1] in self.encoder.specials:  # e.g. the end of a turn of calls
            body, closing = body[:-1], body[-1:]
        if not closing and self.eos is not None and body[-1:] == [self.eos]:
            body, closing = body[:-1], [self.eos]
        if not closing and last and self.data.append_eos:
            closing = [self.eos]
        if not body:
            raise ValueError("empty response: the tokenizer makes no token of it")
        if {self.bos, self.eos, *closing[:1]} & set(body):
            raise ValueError("a response contains BOS, EOS or the end of a turn")
        return body + closing

    @cached_property
    def _turn_end_ids(self) -> list[int]:
        """Tokens with which a response of a chat ends, when the first of them is a special one; else none."""
        ids = self.encoder.alone(self.chat.turn_end[1]).ids
        return ids if ids[:1] and ids[0] in self.encoder.specials else []


def _label(record: Record, responses: list[list[int]]) -> list[list[float]] | None:
    """An unpaired response's label as a reward on its last token: 1 for a good one, −1 for a bad one."""
    if not isinstance(record, Unpaired):
        return None
    return [[0.0] * (len(response) - 1) + [1.0 if record.label else -1.0] for response in responses]
