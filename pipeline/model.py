"""The policy: a causal language model (with or without LoRA) that turns a Batch into a PolicyOut.

The prompt of a group is computed once (`trunk`); the vocabulary projection runs at response positions only, in chunks. A
model that cannot take packed rows runs its responses as separate rows instead, and says so. Where an objective asks for the
exact KL to the reference, the frozen reference runs beside it.

Left out: where weights come from (`pretrained`), how they are trained (`engine`), what is made of log-probs (`objectives`).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline import latent as thinking
from pipeline import widening
from pipeline.config import ConfigError, LoraSection, ModelConfig
from pipeline.contracts import Batch, Needs, PolicyOut
from pipeline.distributed import greatest
from pipeline.ops import token_statistics
from pipeline.packing import FAILURES, choose_layout, one_line, uncompiled_attention
from pipeline.pretrained import load_causal_lm, precision
from pipeline.thinker import NewPrior, prior_for
from pipeline.trunk import token_states, trunk_of


class OutputHead(nn.Module):
    """What is left of a language model without its trunk: turns hidden states that were cached into logits."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        widening.attach(lm)
        self.config, self.head = lm.config, lm.get_output_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Policy(nn.Module):
    """log π(response | prompt) per token, for any causal language model of transformers.

    Args:
        lm: the language model; LoRA layers are injected into it when `lora` is given.
        lora: adapter settings, or None to train all weights.
        kl: which exact per-token KL to the reference to compute (`Needs.kl`); the reference is `frozen`, or with LoRA
            and without `frozen` the same model with the adapter off.
        frozen: the reference, or its `OutputHead` where its states are cached (`Batch.ref_states`). It is no submodule:
            neither trained, nor partitioned, nor saved.
        keep_states: fill `PolicyOut.states`, for a value head on this trunk.
        prior: makes the thoughts that stand before every response, or None.
        read_steps: fill `PolicyOut.steps` and `step_texts` as well.
    """

    def __init__(
        self,
        lm: nn.Module,
        lora: LoraSection | None = None,
        kl: Literal["none", "forward", "reverse"] = "none",
        frozen: nn.Module | None = None,
        keep_states: bool = False,
        prior: thinking.Prior | None = None,
        read_steps: bool = False,
    ) -> None:
        super().__init__()
        remove_dropout(lm)
        self.layout = choose_layout(lm)
        _check_head(lm)
        self.lm = lm
        self.kl: Literal["none", "forward", "reverse"] = kl
        self.keep_states, self.read_steps = keep_states, read_steps
        self.prior = prior
        self._adapter: Any = None
        if lora is not None:
            object.__setattr__(self, "_adapter", add_lora(lm, lora))  # not a submodule: parameters keep one name
        self._reference_layout = self.layout
        if frozen is not None and not isinstance(frozen, OutputHead):
            remove_dropout(frozen)
            self._reference_layout = choose_layout(frozen)
        object.__setattr__(self, "_frozen", frozen)
        assert kl == "none" or frozen is not None or lora is not None, "a KL needs a reference"

    def forward(self, batch: Batch) -> PolicyOut:
        """Log-probs at every trained response token, and the KL to the reference there where asked for, [B, K, R] float32."""
        states, thoughts = self._states(batch)  # [N, D]
        ids = batch.response_ids[batch.response_mask]  # [N]
        vocabulary = self.lm.config.get_text_config().vocab_size
        reference = None if self.kl == "none" else (self._reference_states(batch), self._reference_logits)
        head = list(self.lm.get_output_embeddings().parameters())
        partitioned = any(hasattr(p, "ds_id") for p in head)  # ZeRO-3: each call of it gathers its weights
        longest = greatest(len(ids), ids.device) if partitioned else len(ids)
        # A frozen weight that is partitioned again is not there any more when a repeated chunk's gradient wants it.
        again = not partitioned or any(p.requires_grad for p in head)
        logprobs, kl = token_statistics(states, ids, self.project, vocabulary, reference, self.kl, longest, again)
        return PolicyOut(
            logprobs=unflatten(logprobs, batch.response_mask),
            kl=unflatten(kl, batch.response_mask) if kl is not None else None,
            states=states.detach() if self.keep_states else None,
            **thoughts,
        )

    @property
    def places(self) -> int:
        """Thoughts that stand in every row."""
        return 0 if self.prior is None else self.prior.n_latents

    def _states(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The states that predict the trained tokens, and what is known of latent thoughts, by its name in `PolicyOut`."""
        if self.prior is None:
            return token_states(self.lm, batch, self.layout), {}
        embed = self.lm.get_input_embeddings()
        reading = thinking.read(self.prior, embed, batch, self.places, self.read_steps)
        rows = thinking.insert(batch, self.places)
        read = thinking.embeddings(embed, rows.input_ids, reading.thoughts)
        found = {"thoughts": reading.thoughts.float(), "question": reading.question.float()}
        if reading.steps is not None and batch.step_ends is not None:
            ends = batch.step_ends[:, 0]
            found["steps"] = reading.steps.float() * (ends >= 0)[..., None]
            found["step_texts"] = thinking.mean_texts(embed, thinking.Steps(batch.response_ids[:, 0], ends))
        return token_states(self.lm, rows, self.layout, read), found

    def project(self, states: Tensor) -> Tensor:
        """[N, D] → logits [N, V], through the head *module*: under ZeRO-3 its weight exists only while it runs."""
        return _logits(self.lm, states)

    @torch.no_grad()
    def _reference_states(self, batch: Batch) -> Tensor:
        if batch.ref_states is not None:
            return batch.ref_states
        with self._reference_weights() as lm:
            return token_states(lm, batch, self._reference_layout)

    @torch.no_grad()
    def _reference_logits(self, states: Tensor) -> Tensor:
        with self._reference_weights() as lm:
            return _logits(lm, states)

    @contextmanager
    def _reference_weights(self) -> Iterator[nn.Module]:
        """The frozen model, or the policy's own with the adapter off."""
        if self._frozen is not None:
            yield self._frozen
        else:
            with self._adapter.disable_adapter():
                yield self.lm

    def place(self, device: torch.device) -> None:
        """Move the reference, which no engine knows of, to where the policy runs."""
        if self._frozen is not None:
            self._frozen.to(device)

    def merged(self) -> nn.Module:
        """The plain language model, adapters folded into its weights (for export; ends training)."""
        if self._adapter is not None:
            merge_lora(self.lm, self._adapter)
        return self.lm

    def enable_activation_checkpointing(self) -> None:
        """Recompute each layer in the backward pass."""
        recompute_layers(self.lm)


def load_policy(
    config: ModelConfig,
    path: str | Path,
    needs: Needs | None = None,
    frozen: str | Path | None = None,
    keep_states: bool = False,
    cached: bool = False,
    new: NewPrior | None = None,
) -> Policy:
    """The policy of a run, from the folder or hub name that `model_files.locate` gave.

    needs, frozen: what the objective asks of it, and the reference's weights, where that is an exact KL; `cached`: every
        batch will bring the reference's states, so that of the reference only the head is kept.
    new: the prior to start with where `path` holds none; one that is there comes along in any case.
    """

    def load(source: str | Path) -> nn.Module:
        return load_causal_lm(str(source), precision(config.dtype), config.attention, config.trust_remote_code)

    kl = needs.kl if needs is not None else "none"
    beside = kl != "none" and (config.lora is None or str(frozen) != str(path))
    assert not beside or frozen is not None
    reference = load(frozen).requires_grad_(False) if beside and frozen is not None else None
    if reference is not None and cached:
        reference = OutputHead(reference)
    lm = load(path)
    prior = prior_for(lm, str(path), config, new)
    if new is not None and new.latent.backbone == "frozen":
        lm.requires_grad_(False)
    steps = needs is not None and needs.latent == "steps"
    policy = Policy(lm, config.lora, kl, reference, keep_states, prior, steps)
    if config.activation_checkpointing:
        policy.enable_activation_checkpointing()
    return policy


def unflatten(values: Tensor, mask: Tensor) -> Tensor:
    """[N] at the mask's True places → [B, K, R], 0 elsewhere."""
    zeros = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return zeros.masked_scatter(mask, values)


def _logits(lm: nn.Module, hidden: Tensor) -> Tensor:
    """Output head, with what some architectures do to logits after it (Granite, Cohere, Gemma, xLSTM)."""
    config = lm.config.get_text_config()
    logits = lm.get_output_embeddings()(hidden)
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / scaling
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if (cap := getattr(config, name, None)) is not None:
            logits = cap * torch.tanh(logits / cap)
    return logits


# ------------------------------------------------------------------------------------------------- checks


@torch.no_grad()
def _check_head(lm: nn.Module) -> None:
    """Raises ConfigError where `_logits` is not what the model does: some transform logits behind their head.

    Or where it does something else in training mode, as where dropout is read from the configuration.
    """
    was_training, own = lm.training, {}
    ids = torch.tensor([[5, 11, 7, 13, 4]], device=lm.device) % lm.config.get_text_config().vocab_size
    try:
        with uncompiled_attention(lm):
            for training in (True, False):
                lm.train(training)
                own[training] = lm(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            ours = _logits(lm, trunk_of(lm)(input_ids=ids, use_cache=False).last_hidden_state).float().log_softmax(-1)
    except FAILURES as error:
        raise ConfigError(
            f"model.path: {type(lm).__name__} has no output head as qalign knows them ({one_line(error)})"
        ) from None
    finally:
        lm.train(was_training)
    allowed = 1e-3 if lm.dtype == torch.float32 else 0.2
    if (ours - own[False]).abs().max() > allowed:
        raise ConfigError(f"model.path: {type(lm).__name__} transforms its logits in a way qalign does not know")
    if (own[True] - own[False]).abs().max() > allowed:
        raise ConfigError(
            f"model.path: {type(lm).__name__} draws random numbers while it trains, so that it would not start as the "
            "reference; set dropout and noise in the model's config.json to 0, or use another model"
        )


def recompute_layers(lm: nn.Module) -> None:
    """Recompute each layer in the backward pass: activation checkpointing."""
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def remove_dropout(lm: nn.Module) -> None:
    """Preference objectives compare two models: the policy at step 0 has to be the reference.

    Off are dropout, the dropping of whole layers, and a router's noise, under whatever name a module has them. The
    configuration keeps its values, as an export does. A number that evaluation reads as well stays: `_check_head` refuses the model.
    """
    noise = []
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in [name for name, value in vars(module).items() if isinstance(value, float)]:
            if "drop" in name:
                setattr(module, name, 0.0)
            elif "jitter" in name and getattr(module, name):
                noise.append((module, name, getattr(module, name)))
    if noise:
        before = _evaluated(lm)
        for module, name, _ in noise:
            setattr(module, name, 0.0)
        if not torch.equal(before, _evaluated(lm)):
            for module, name, value in noise:
                setattr(module, name, value)


@torch.no_grad()
def _evaluated(lm: nn.Module) -> Tensor:
    """Hidden states of a few tokens in evaluation mode."""
    was_training = lm.training
    ids = torch.arange(2, 34, device=lm.device)[None] % lm.config.get_text_config().vocab_size
    try:
        with uncompiled_attention(lm):
            return trunk_of(lm.eval())(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        lm.train(was_training)


def add_lora(lm: nn.Module, lora: LoraSection, task: str = "CAUSAL_LM") -> Any:
    """Inject adapters into `lm` in place; returns peft's handle. Only the adapters stay trainable."""
    import peft

    widest = max((max(m.weight.shape) for m in lm.modules() if isinstance(m, nn.Linear)), default=lora.r)
    if lora.r > widest:
        raise ConfigError(f"model.lora.r: {lora.r} exceeds the width of the model's widest layer, {widest}; lower it")
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type=task
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # its old name
            warnings.filterwarnings("ignore", ".*tie_word_embeddings", UserWarning)  # `merge_lora` unties them
            handle = peft.get_peft_model(lm, settings)
    except ValueError as error:
        raise ConfigError(f"model.lora.target_modules: {' '.join(str(error).split())[:200]}") from None
    widening.attach(lm)  # the adapters
    return handle


@torch.no_grad()
def merge_lora(lm: nn.Module, handle: Any) -> None:
    """Fold the adapters of `add_lora` into the weights of `lm`, in place.

    An adapter belongs to one module, but its weight may be tied to another's (embeddings and output head): folded into both, it
    would change what was never trained. Such weights are untied first, in the model and in its configuration.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    users = Counter(id(p) for module in lm.modules() for p in module.parameters(recurse=False))
    adapted = [module.get_base_layer() for module in lm.modules() if isinstance(module, BaseTunerLayer)]
    if any(users[id(getattr(layer, "weight", None))] > 1 for layer in adapted):
        _untie(lm)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tie_word_embeddings", UserWarning)  # a trunk alone has nothing tied to it
        handle.merge_and_unload()


def _untie(lm: nn.Module) -> None:
    """Give every module weights of its own: a model's configuration ties all of its tied weights, or none."""
    seen: set[int] = set()
    for module in lm.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) in seen:
                setattr(module, name, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
            seen.add(id(p))
    for config in [module.config for module in lm.modules() if hasattr(module, "get_input_embeddings")]:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
