"""The objectives, one file each. Adding one: a file beside this one and a line in `OBJECTIVES`."""

from __future__ import annotations

from pipeline import dotted
from pipeline.contracts import Objective
from pipeline.objectives.dpo import Dpo
from pipeline.objectives.dqo import Dqo
from pipeline.objectives.dro import Dro
from pipeline.objectives.f_dpo import FDpo
from pipeline.objectives.ipo import Ipo
from pipeline.objectives.kto import Kto
from pipeline.objectives.lta import Lta
from pipeline.objectives.oreo import Oreo
from pipeline.objectives.orpo import Orpo
from pipeline.objectives.plackett_luce import PlackettLuce
from pipeline.objectives.rejection_sft import RejectionSft
from pipeline.objectives.reward_model import RewardModel
from pipeline.objectives.sft import Sft
from pipeline.objectives.simpo import SimPo
from pipeline.objectives.tdpo import Tdpo
from pipeline.objectives.unlikelihood import Unlikelihood

OBJECTIVES: dict[str, type[Objective]] = {
    "sft": Sft,
    "dpo": Dpo,
    "f_dpo": FDpo,
    "plackett_luce": PlackettLuce,
    "ipo": Ipo,
    "simpo": SimPo,
    "orpo": Orpo,
    "unlikelihood": Unlikelihood,
    "rejection_sft": RejectionSft,
    "tdpo": Tdpo,
    "kto": Kto,
    "dro": Dro,
    "dqo": Dqo,
    "oreo": Oreo,
    "lta": Lta,
    "reward_model": RewardModel,
}


def resolve(name: str) -> type[Objective]:
    """The class behind a registry name or a dotted path `package.module:Class`. Raises ValueError."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if not dotted.is_dotted(name):
        raise ValueError(f"name: {name!r} is none of {', '.join(OBJECTIVES)}, nor a dotted path package.module:Class")
    try:
        found = dotted.load(name)
    except ImportError as error:
        raise ValueError(f"name: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ValueError(f"name: {name!r} is not a subclass of pipeline.contracts.Objective")
    if not hasattr(found, "needs"):
        raise ValueError(f"name: {name!r} has no `needs`; add `needs: ClassVar[Needs] = Needs(records=…, reference=…)`")
    if absent := [method for method in _METHODS if getattr(found, method) is getattr(Objective, method)]:
        raise ValueError(f"name: {name!r} does not define {', '.join(absent)}; see `pipeline.contracts.Objective`")
    return found


_METHODS = ("weight", "__call__", "token_reward")
"""What each objective has to define."""
