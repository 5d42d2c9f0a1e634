"""Scores by a sequence classifier of transformers, or by a reward model that this project trained, as a Ray Data stage.

A reward model that shares the policy's tokenizer scores the very tokens that were sampled, through the forward that it was
trained with. Any other classifier reads the text of prompt and response with its own tokenizer: the probability of one of
its labels (`evaluation.label`), or its only output as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.collate import collate
from pipeline.config import ConfigError, ModelConfig, RunConfig
from pipeline.contracts import Row
from pipeline.evaluation.held_out import resources
from pipeline.evaluation.judging import Failure, Scores, Texts
from pipeline.export import weights_of
from pipeline.pretrained import classifies, load_config, load_tokenizer, precision
from pipeline.reward import load_reward_network
from pipeline.stage import Item, run_stage
from pipeline.weight_files import check_fetched

PIECE = 256
BATCH = 32
KEY = "sampling.scorer"


class Classifier:
    """A judge. Building it reads configurations only, and makes a damaged export or one that a checkpoint lacks.

    Raises ConfigError where `path` holds no sequence classifier, or `evaluation.label` names none of its labels.
    """

    def __init__(self, config: RunConfig, model: str | None, path: str) -> None:
        if not path:
            raise ConfigError(f"{KEY}: write classifier:NAME, with the hub name or folder of a sequence classifier")
        self._config, self._model = config, model
        self._path = weights_of(path, Path(config.storage) / "cache", KEY, config.model.trust_remote_code)
        found = load_config(self._path, config.model.trust_remote_code, KEY)
        if not classifies(found):
            raise ConfigError(f"{KEY}: {path} is no sequence classifier; name one, or a run of objective reward_model")
        self._label = label_index(found, config.evaluation.label)

    def __call__(self, completions: Sequence[Texts], local: bool) -> Scores:
        assert self._model is not None
        config = self._config
        own_tokens = self._label is None and _same_tokens(self._path, self._model, config.model.trust_remote_code)
        arguments = {
            "path": self._path,
            "label": self._label,
            "own_tokens": own_tokens,
            "config": config.model.model_dump(mode="json"),
            "gpu": config.scaling.gpus_per_worker > 0,
        }
        items = [{"completions": json.dumps(completions[i : i + PIECE])} for i in range(0, len(completions), PIECE)]
        done = run_stage(ScoreTexts, arguments, items, label="score", resources=resources(config), local=local)
        scores = np.array([score for part in done for score in part["scores"]], dtype=np.float64)
        failures: list[Failure] = [(int(i), f"the score is {scores[i]}") for i in np.flatnonzero(~np.isfinite(scores))]
        scores[~np.isfinite(scores)] = math.nan
        return scores, failures


def label_index(config: Any, label: str | int | None) -> int | None:
    """The output that is the score; None: the only one, as it is. Raises ConfigError."""
    names = {int(i): str(name) for i, name in config.id2label.items()}
    known = ", ".join(f"{i} ({name})" for i, name in sorted(names.items()))
    if label is None:
        if len(names) > 1:
            raise ConfigError(f"evaluation.label: name the label whose probability is the score: {known}")
        return None
    for i, name in names.items():
        if label in (i, name) or str(label) == str(i):
            return None if len(names) == 1 else i
    raise ConfigError(f"evaluation.label: the classifier has no label {label!r}; it has {known}")


def _same_tokens(path: str, model: str, trust_remote_code: bool) -> bool:
    """Whether a token means the same to both."""
    own, theirs = (load_tokenizer(p, trust_remote_code).get_vocab() for p in (path, model))
    return own == theirs


class ScoreTexts:
    """The actor: completions (the fields of `Texts`) → their scores."""

    def __init__(self, path: str, label: int | None, own_tokens: bool, config: dict[str, Any], gpu: bool) -> None:
        self.device = torch.device("cuda" if gpu else "cpu")
        own = ModelConfig.model_validate(config).model_copy(update={"lora": None, "activation_checkpointing": False})
        self.label, self.network = label, None
        if own_tokens:
            self.network = load_reward_network(own, path, trained=True).to(self.device).eval()
        else:
            self.tokenizer = load_tokenizer(path, own.trust_remote_code, KEY)
            self.model = _load(path, own).to(self.device).eval()
            self.bound = _longest(self.model)

    @torch.inference_mode()
    def __call__(self, item: Item) -> Item:
        texts = [Texts(*fields) for fields in json.loads(item["completions"])]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].prompt_ids) + len(texts[i].response_ids))
        scores = [math.nan] * len(texts)
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            found = self._by_tokens if self.network is not None else self._by_text
            for place, score in zip(places, found([texts[i] for i in places]), strict=True):
                scores[place] = score
        return {"scores": scores}

    def _by_tokens(self, texts: list[Texts]) -> list[float]:
        assert self.network is not None
        rows = [Row(i, list(t.prompt_ids), [list(t.response_ids)]) for i, t in enumerate(texts)]
        scores = self.network(collate(rows).to(self.device)).scores
        assert scores is not None
        return scores[:, 0].tolist()

    def _by_text(self, texts: list[Texts]) -> list[float]:
        if self.tokenizer.pad_token_id is None and len(texts) > 1:
            return [score for text in texts for score in self._by_text([text])]
        whole = [self._ended(t.prompt + t.response) for t in texts]
        limit = {"truncation": True, "max_length": self.bound} if self.bound else {}
        inputs = self.tokenizer(whole, padding=len(whole) > 1, return_tensors="pt", **limit)
        logits = self.model(**inputs.to(self.device)).logits.float()
        if self.label is None:
            return logits[:, 0].tolist()
        several = self.model.config.problem_type == "multi_label_classification"
        return (logits.sigmoid() if several else logits.softmax(-1))[:, self.label].tolist()

    def _ended(self, text: str) -> str:
        """Classifiers on a language model read their score at the last token, which in training was the one that ends a text."""
        reads_last = isinstance(getattr(self.model, "score", None), torch.nn.Linear)
        end = self.tokenizer.eos_token
        return text + end if reads_last and end and not text.endswith(end) else text


def _longest(model: torch.nn.Module) -> int | None:
    """The most tokens of a text that it has positions for; None: as many as there are."""
    bound = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if bound and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return bound - module.padding_idx - 1  # RoBERTa's begin behind that of padding
    return bound


def _load(path: str, own: ModelConfig) -> torch.nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    check_fetched(path, KEY)
    try:
        return AutoModelForSequenceClassification.from_pretrained(
            path, dtype=precision(own.dtype), trust_remote_code=own.trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{KEY}: cannot load the classifier {path} ({reason}); check its files") from None
