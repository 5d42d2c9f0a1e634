"""What learns in a run: the policy, and the critic where the objective has one, behind the calls of one engine.

    learner = Learner.start(config, model, frozen, device, resume)
    out = learner(batch);  learner.backward(losses, last=…)  per micro-batch;  learner.step(step, total)  per optimizer step

Both are updated from the same forward: values and log-probs are those from before the step.

Left out: DeepSpeed (`engine`), losses (`objectives`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError, RunConfig
from pipeline.contracts import Batch, PolicyOut, TermGroup
from pipeline.critic import CRITIC, Critic, load_critic, load_trained_critic
from pipeline.engine import Engine
from pipeline.model import Policy, load_policy
from pipeline.optimizer import lr_at
from pipeline.reward import RewardNetwork, load_reward_network
from pipeline.thinker import new_prior
from pipeline.trunk import pads


def _nothing() -> None:
    """Nobody listens."""


def load_networks(
    config: RunConfig, model: str, frozen: str | None, cached: bool = False
) -> tuple[Policy | RewardNetwork, Critic | None]:
    """The networks that the objective asks for, from the weights at `model`; `frozen` holds the reference's, whose states
    come with each batch where they are `cached`."""
    torch.manual_seed(config.seed)  # what starts with random weights, adapters above all, is a function of it alone
    needs = config.objective.needed()
    if needs.model == "reward":
        return load_reward_network(config.model, model), None
    head = needs.critic and config.critic.architecture == "head"
    policy = load_policy(config.model, model, needs, frozen, head, cached, new_prior(config))
    return policy, load_critic(config, model) if needs.critic else None


def forward(
    policy: Callable[[Batch], PolicyOut], critic: Callable[[Batch, PolicyOut], Tensor] | None, batch: Batch
) -> PolicyOut:
    """The policy's output, with the critic's values where there is one."""
    out = policy(batch)
    return out if critic is None else replace(out, values=critic(batch, out))


def load_trained(
    config: RunConfig, model: str, frozen: str | None, device: torch.device
) -> Callable[[Batch], PolicyOut]:
    """The forward of what a run exported to `model`, for evaluation: adapters are merged, the critic lies beside."""
    needs = config.objective.needed()
    settings = config.model.model_copy(update={"lora": None, "activation_checkpointing": False})
    if needs.model == "reward":
        return load_reward_network(settings, model, trained=True).to(device).eval()
    critic = load_trained_critic(config, Path(model) / CRITIC).to(device).eval() if needs.critic else None
    keep_states = critic is not None and critic.trunk is None
    policy = load_policy(settings, model, needs, frozen, keep_states).to(device).eval()
    if needs.latent != "none" and policy.prior is None:
        raise ConfigError(
            f"checkpoint_from: {model} holds no prior, which this objective is evaluated with; name a run of it"
        )
    policy.place(device)
    return partial(forward, policy, critic)


def head_share(networks: Sequence[nn.Module]) -> float:
    """What the output head costs at a token, where everything below it costs 1: by the weights that are multiplied with.

    Taken for equal: forward and backward pass, trained and frozen, and experts, as if all of them were asked.
    """
    if not isinstance(networks[0], Policy):
        return 0.0
    head = networks[0].lm.get_output_embeddings()
    looked_up = [module for network in networks for module in network.modules() if isinstance(module, nn.Embedding)]
    apart = {id(p) for module in (head, *looked_up) for p in module.parameters()}
    below = sum(_numel(p) for network in networks for p in network.parameters() if id(p) not in apart)
    return sum(map(_numel, head.parameters())) / max(1, below)


def _numel(p: nn.Parameter) -> int:
    return getattr(p, "ds_numel", p.numel())  # ZeRO-3 keeps a part of it


class Learner:
    """The engines of one run on this rank; every method is collective.

    Args:
        policy: the engine of the terms of group "policy".
        critic: the engine of the terms of group "critic", or None.
        alone: so many steps at the start train the critic alone.
    """

    def __init__(self, policy: Engine, critic: Engine | None = None, alone: int = 0) -> None:
        self.policy, self.critic = policy, critic
        self.rank: int = policy.rank
        self.device: torch.device = policy.device
        networks = [engine.module for engine in (policy, critic) if engine is not None]
        self.places: int = getattr(policy.module, "places", 0)  # tokens that the policy puts into every row
        self.padded: bool = any(pads(network.layout) for network in networks)
        self.head_share: float = head_share(networks)
        self.beat: Callable[[], None] = _nothing
        """Called whenever some work is done: what a watchdog listens to."""
        self._alone = alone if critic is not None else 0
        self._engines: dict[TermGroup, Engine] = {"policy": policy} | ({"critic": critic} if critic else {})

    @classmethod
    def start(
        cls,
        config: RunConfig,
        model: str,
        frozen: str | None,
        device: torch.device,
        resume: Path | None,
        cached: bool = False,
    ) -> Learner:
        """Load the networks and go on from the checkpoint `resume`, if there is one; the others: as `load_networks`."""
        network, critic = load_networks(config, model, frozen, cached)
        if isinstance(network, Policy):
            network.place(device)
        # In training mode, as layers are recomputed in it alone; nothing else differs (`model.remove_dropout`).
        policy = Engine(network.train(), config, device, resume)
        if critic is None:
            return cls(policy)
        return cls(policy, Engine(critic.train(), config, device, resume, role="critic"), config.critic.steps_alone)

    def __call__(self, batch: Batch, step: int = 0) -> PolicyOut:
        """log π, and V(s) where there is a critic; while the critic trains alone, log π has no gradient."""
        self.beat()
        if step >= self._alone:
            return forward(self.policy, self.critic, batch)
        with torch.no_grad():
            out = self.policy(batch)
        assert self.critic is not None
        return replace(out, values=self.critic(batch, out))

    def backward(self, losses: Mapping[TermGroup, Tensor], last: bool, step: int = 0) -> None:
        """Accumulate the gradients of one micro-batch; each group's loss moves its own network only."""
        for group in self._learning(step):
            self._engines[group].backward(losses[group], last)

    def step(self, step: int, total_steps: int) -> dict[str, float]:
        """Update with the learning rates of this step → norms and rates.

        Raises FloatingPointError on all ranks alike, after each network whose norm is finite was updated; no gradient is left.
        """
        metrics, failed = {}, None
        for group in self._learning(step):
            engine, prefix = self._engines[group], "" if group == "policy" else f"{group}/"
            lr = lr_at(step, total_steps, engine.optimizer)
            try:
                metrics |= {f"{prefix}grad_norm": engine.step(lr), f"{prefix}lr": lr}
            except FloatingPointError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return metrics

    def updates(self) -> dict[str, int]:
        """How often each network was updated: its optimizer's step count."""
        return {group: engine.steps for group, engine in self._engines.items()}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Networks in evaluation mode."""
        for engine in self._engines.values():
            engine.module.eval()
        yield
        for engine in self._engines.values():
            engine.module.train()

    def evaluate(self, batch: Batch) -> PolicyOut:
        """The networks' output, whatever is being trained."""
        self.beat()
        return forward(self.policy, self.critic, batch)

    def parts(self, copied: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """This rank's share of a checkpoint of all networks, see `Engine.parts`."""
        for engine in self._engines.values():
            for part in engine.parts(copied):
                self.beat()
                yield part

    def files(self) -> list[str]:
        """The names of all ranks' files of a checkpoint of all networks."""
        return [name for engine in self._engines.values() for name in engine.files()]

    def close(self) -> None:
        """Release everything. The learner cannot be used afterwards."""
        for engine in self._engines.values():
            engine.close()

    def _learning(self, step: int) -> list[TermGroup]:
        return ["critic"] if step < self._alone else list(self._engines)
