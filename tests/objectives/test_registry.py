"""Names of objectives, their defaults, and a user's own objective in one class."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
from torch import Tensor

from pipeline import config_file
from pipeline.config import ConfigError
from pipeline.contracts import Batch, LossOut, Needs, Objective, PolicyOut, Term
from pipeline.objectives import OBJECTIVES, resolve
from pipeline.objectives.dpo import Dpo
from pipeline.objectives.dqo import Dqo
from pipeline.objectives.dro import Dro
from pipeline.objectives.f_dpo import FDpo
from pipeline.objectives.ipo import Ipo
from pipeline.objectives.kto import Kto
from pipeline.objectives.oreo import Oreo
from pipeline.objectives.orpo import Orpo
from pipeline.objectives.plackett_luce import PlackettLuce
from pipeline.objectives.rejection_sft import RejectionSft
from pipeline.objectives.simpo import SimPo
from pipeline.objectives.tdpo import Tdpo
from pipeline.objectives.unlikelihood import Unlikelihood
from tests.batches import as_out, loss_of, with_ratios


def test_registry_names_are_importable_classes():
    for name, objective in OBJECTIVES.items():
        assert resolve(name) is objective
        assert objective.needs.records
        assert objective.model_config["frozen"]
        assert objective.model_config["extra"] == "forbid"
        assert objective.__doc__
        assert not any(field.is_required() for field in objective.model_fields.values())


def test_defaults_are_the_published_ones():
    """β 0.1 as in the DPO, IPO, KTO and TDPO code; SimPO's 2 with γ/β = 1/2; ORPO's λ 0.1; TDPO₂'s α 0.5; OREO's and DRO's."""
    for objective in (Dpo, FDpo, PlackettLuce, Ipo, Kto, Tdpo):
        assert objective().beta == 0.1
    assert (SimPo().beta, SimPo().gamma) == (2.0, 1.0)
    assert (Orpo().odds_weight, Unlikelihood().alpha, RejectionSft().keep_fraction) == (0.1, 0.1, 0.5)
    assert not Ipo().length_normalised
    assert (Tdpo().variant, Tdpo().alpha) == (2, 0.5)
    assert (Kto().desirable_weight, Kto().undesirable_weight) == (1, 1)
    assert (Oreo().beta, Oreo().kl_weight, Dro().beta) == (0.03, 0.01, 1.0)
    assert (Dqo().lam, Dqo().q_target, Dqo().importance, Dqo().importance_cap) == (1.0, "return", "none", math.e)
    assert (FDpo().divergence, FDpo().alpha) == ("reverse_kl", 0.5)


class Hinge(Objective):
    """max(0, margin − (ℓ_w − ℓ_l)): what adding an objective costs."""

    needs: ClassVar[Needs] = Needs(records=frozenset({"preference"}), reference="token")
    margin: float = 1.0

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"hinge": batch.weight.sum()}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        reward = self.implied_reward(out, batch)
        loss = (self.margin - reward[:, 0] + reward[:, 1]).clamp(min=0)
        return LossOut({"hinge": Term((loss * batch.weight).sum())})

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        return out.logprobs - batch.ref_logprobs


class Unfinished(Objective):
    """Lacks what the pipeline divides by, and the credit of tokens."""

    needs: ClassVar[Needs] = Needs(records=frozenset({"preference"}))

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        return LossOut({})


def _plain(name: str, **parameters: object) -> dict:
    return {
        "data": {"kind": "preference", "sources": [{"path": "pairs.jsonl"}]},
        "model": {"path": "some/model"},
        "objective": {"name": name, **parameters},
    }


def test_own_objective_loads_by_dotted_path():
    name = f"{__name__}:Hinge"
    loaded = config_file.validate(_plain(name, margin=2.0))
    assert loaded.objective == Hinge(margin=2.0)
    assert loaded.objective_name == name
    assert config_file.validate(loaded.dump()) == loaded
    batch, raw = with_ratios([[0.5, 0.25]])
    assert loss_of(loaded.objective, as_out(raw, batch), batch).item() == pytest.approx(1.75)


def test_own_objective_needs_one_class_and_one_registry_line(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "hinge", Hinge)
    loaded = config_file.validate(_plain("hinge"))
    assert loaded.objective == Hinge()
    assert loaded.dump()["objective"] == {"name": "hinge", "margin": 1.0}
    branches = config_file.json_schema()["properties"]["objective"]["anyOf"]
    assert any(branch["properties"]["name"].get("const") == "hinge" for branch in branches)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("dpoo", f"none of {', '.join(OBJECTIVES)}, nor a dotted path"),
        ("no_such_module:Thing", "cannot load"),
        (f"{__name__}:Missing", "cannot load"),
        (f"{__name__}:Unfinished", "does not define weight, token_reward; see `pipeline.contracts.Objective`"),
        ("torch.nn:Linear", "not a subclass"),
        ("collections:OrderedDict", "is not installed"),
    ],
)
def test_unknown_objectives_are_refused_in_one_line(name, cause):
    with pytest.raises(ConfigError, match=r"^objective: name: ") as error:
        config_file.validate(_plain(name))
    assert cause in str(error.value)
    assert "\n" not in str(error.value)
