"""TRL's `DPOTrainer`, its own `train()` from data loader to optimizer, held between steps by a callback.

Rows come tokenised; the subclass only leaves out the tokenising and notes what a step computed. Pairs of a ranking are
separate rows, as TRL wants them.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.throughput.pace import Pace
from benchmarks.throughput.tasks import Task, digests
from benchmarks.throughput.workloads import OPTIMIZER

DEPARTURES = "no truncation, no shuffling, no logging, no checkpoints"
"""What is set against TRL's defaults for everyone's sake, beside the optimizer and the loss's β."""


class Trl:
    """`DPOTrainer` on all steps' pairs, in order."""

    def __init__(self, task: Task) -> None:
        entry, steps = task.entry, task.groups()
        rows = [
            {"prompt_ids": group.prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            for groups in steps
            for group in groups
            for chosen, rejected in group.pairs()
        ]
        self._batch = len(rows) // len(steps)
        self._output = tempfile.TemporaryDirectory()
        config = DPOConfig(
            output_dir=self._output.name,
            use_cpu=True,
            per_device_train_batch_size=self._batch,
            max_steps=len(steps),
            beta=task.workload.objective["beta"],
            learning_rate=OPTIMIZER["lr"],
            lr_scheduler_type="constant",
            adam_beta1=OPTIMIZER["betas"][0],
            adam_beta2=OPTIMIZER["betas"][1],
            adam_epsilon=OPTIMIZER["eps"],
            weight_decay=OPTIMIZER["weight_decay"],
            max_grad_norm=OPTIMIZER["clip"],
            bf16=entry.precision == "bfloat16",
            gradient_checkpointing=entry.checkpointing,
            precompute_ref_log_probs=entry.reference == "precomputed",
            precompute_ref_batch_size=self._batch,
            max_length=None,
            train_sampling_strategy="sequential",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (task.policy, task.reference)
        )
        self._trainer = _Watched(
            policy, reference, args=config, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer()
        )
        if entry.reference == "precomputed":  # it has served: the log-probs are columns of the rows now
            self._trainer.ref_model = None

    def logprobs(self) -> dict[int, list[float]]:
        """[chosen, rejected] of each pair of the first step."""
        batch = next(iter(self._trainer.get_train_dataloader()))
        chosen, rejected = self._trainer.compute_ref_log_probs(self._trainer.model, batch)
        return dict(enumerate(torch.stack([chosen, rejected], -1).double().tolist()))

    def train(self, pace: Pace) -> None:
        self._trainer.add_callback(_Pacing(pace, self._trainer))
        self._trainer.train()
        self._output.cleanup()


class _Watched(DPOTrainer):
    """The trainer, with the last step's loss, gradient norm and token ids kept for the report."""

    seen: tuple[dict[str, Any], Tensor]
    norm: float

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **named: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **named)
        self.seen = inputs, loss.detach()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.norm = float(norm)
        return norm


class _Pacing(TrainerCallback):
    """A step lasts from the end of the one before: it includes loading the rows."""

    def __init__(self, pace: Pace, trainer: _Watched) -> None:
        self._pace, self._trainer = pace, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = not self._pace.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        inputs, loss = self._trainer.seen
        self._pace.end(float(loss), self._trainer.norm, lambda: digests(_sequences(inputs)))
        control.should_training_stop = state.global_step == state.max_steps or not self._pace.begin()


def _sequences(inputs: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) token ids, read back from the collated batch that reached the model."""
    found = []
    for ids, live, answer in zip(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], strict=True):
        found.append((ids[(live == 1) & (answer == 0)].tolist(), ids[answer == 1].tolist()))
    return found


def _tokenizer() -> PreTrainedTokenizerFast:
    """Only its padding token is ever used: the rows are token ids already."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0})))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer
