"""Scorers that stay in memory: guided decoders ask one for every token, so that nothing may be loaded per call.

Left out: the scorers themselves (`pipeline.evaluation.scorers`), and who asks them (`contract.Tools.score`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.collate import collate
from pipeline.config import RunConfig
from pipeline.contracts import Row
from pipeline.decoding.contract import Prompt
from pipeline.decoding.loading import KEYS, scored_by_baseline
from pipeline.evaluation.answers import read_answers
from pipeline.evaluation.classifier import ScoreTexts, label_index
from pipeline.evaluation.judging import Judge, Scores, Texts
from pipeline.evaluation.scorers import SCORERS, Task, answer_scorer, each, resolve
from pipeline.export import weights_of
from pipeline.pretrained import load_config, load_tokenizer
from pipeline.reward import load_reward_network

ROW_TOKENS = 1024
"""Of a packed row of responses to score."""


def load_scorers(config: RunConfig, tokenizer: Any, model: str, gpu: bool) -> dict[str, LiveScorer]:
    """The scorers by role. tokenizer: that of all language models, located at `model`."""
    found = {}
    if config.sampling.scorer is not None:
        found["scorer"] = LiveScorer(config, tokenizer, model, gpu)
    if config.decoding.baseline_scorer is not None:
        found["baseline_scorer"] = LiveScorer(scored_by_baseline(config), tokenizer, model, gpu)
    return found


class LiveScorer:
    """A scorer that stays in memory: guided decoders ask it for each token."""

    def __init__(self, config: RunConfig, tokenizer: Any, model: str, gpu: bool) -> None:
        assert config.sampling.scorer is not None
        kind, _, argument = config.sampling.scorer.partition(":")
        self._config, self._tokenizer, self._model = config, tokenizer, model
        self._judge: Judge | None = None
        self._texts: dict[tuple[int, ...], str] = {}
        self.failure: str | None = None  # what it raised first since `begin`
        if kind == "classifier":
            self._judge = _classifier(config, tokenizer, argument, gpu)
        elif kind in SCORERS and kind != "verifiable":
            self._judge = SCORERS[kind](Task(config, None, (), argument))
        elif kind not in SCORERS:
            self._judge = each(resolve(config.sampling.scorer))

    def begin(self, prompts: Sequence[Prompt], answers: Sequence[str | None] | None) -> None:
        """Get ready for these prompts. answers: one each, where the records are at hand; only `verifiable` reads them."""
        self._texts = {tuple(prompt.ids): self._text(prompt.ids) for prompt in prompts}
        self.failure = None
        if self._config.sampling.scorer == "verifiable":
            texts = set(self._texts.values())
            if answers is None:
                known = read_answers(self._config, self._model, texts)
            else:
                known = self._agreed(prompts, answers)
            self._judge = each(answer_scorer(known, self._config.evaluation.answer_pattern))

    def _agreed(self, prompts: Sequence[Prompt], answers: Sequence[str | None]) -> dict[str, str]:
        """The answer to each prompt's text; none where records disagree, so that scoring it fails."""
        given: dict[str, set[str]] = {}
        for prompt, answer in zip(prompts, answers, strict=True):
            if answer is not None:
                given.setdefault(self._texts[tuple(prompt.ids)], set()).add(answer)
        return {text: found.pop() for text, found in given.items() if len(found) == 1}

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]) -> Tensor:
        """Scores [n] float64, nan where the scorer failed."""
        assert self._judge is not None
        texts = self._tokenizer.batch_decode(
            [list(ids) for ids in responses], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        asked = [
            Texts(self._texts[tuple(prompt.ids)], text, list(prompt.ids), list(ids))
            for prompt, text, ids in zip(prompts, texts, responses, strict=True)
        ]
        scores, failures = self._judge(asked, True)
        if failures and self.failure is None:
            self.failure = failures[0][1]
        return torch.from_numpy(scores)

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def _classifier(config: RunConfig, tokenizer: Any, name: str, gpu: bool) -> Judge:
    """The judge of `evaluation.classifier`, loaded once."""
    trust = config.model.trust_remote_code
    path = weights_of(name, Path(config.storage) / "cache", KEYS["scorer"], trust)
    label = label_index(load_config(path, trust, KEYS["scorer"]), config.evaluation.label)
    if label is None and load_tokenizer(path, trust, KEYS["scorer"]).get_vocab() == tokenizer.get_vocab():
        own = config.model.model_copy(update={"lora": None, "activation_checkpointing": False})
        return RewardOfTokens(load_reward_network(own, path, trained=True).to("cuda" if gpu else "cpu").eval())
    worker = ScoreTexts(path, label, False, config.model.model_dump(mode="json"), gpu)
    return lambda texts, local: (np.array(worker({"completions": json.dumps(texts)})["scores"], dtype=np.float64), [])


class RewardOfTokens:
    """A reward model on the very tokens that were decoded: candidates of one prompt share the prompt's forward."""

    def __init__(self, network: nn.Module) -> None:
        self._network, self._device = network, next(network.parameters()).device

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Texts], local: bool) -> Scores:
        scores = np.full(len(texts), np.nan)
        for places in self._rows(texts):
            row = Row(0, list(texts[places[0]].prompt_ids), [list(texts[i].response_ids) for i in places])
            found = self._network(collate([row]).to(self._device)).scores
            scores[places] = found[0].double().cpu().numpy()
        return scores, []

    @staticmethod
    def _rows(texts: Sequence[Texts]) -> Iterator[list[int]]:
        """Places of the texts of one prompt, as many as fit a packed row."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, text in enumerate(texts):
            groups.setdefault(tuple(text.prompt_ids), []).append(place)
        for prompt, places in groups.items():
            room, row = ROW_TOKENS - len(prompt), []
            for place in places:
                room -= len(texts[place].response_ids)
                if row and room < 0:
                    yield row
                    room, row = ROW_TOKENS - len(prompt) - len(texts[place].response_ids), []
                row.append(place)
            yield row
