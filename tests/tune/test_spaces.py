"""From `sweep.space` to points, and from points to configurations."""

from __future__ import annotations

import random

import pytest

from pipeline.config import ConfigError
from tune.spaces import Space


@pytest.fixture
def space(make_config):
    """space("objective.beta=[0.1]", …) → the Space of a tiny DPO sweep; a leading `!` marks another override."""

    def make(*overrides: str) -> Space:
        found = [o[1:] if o.startswith("!") else f"sweep.space.{o}" for o in overrides]
        return Space(make_config(*found))

    return make


def settings(space: Space) -> list[dict]:
    return [space.overrides(point) for point in space.grid()]


def test_a_grid_is_every_combination_and_each_makes_its_configuration(space) -> None:
    found = space("objective.beta=[0.1,0.3]", "optimizer.lr=[1e-5,1e-4]")
    pairs = {(0.1, 1e-5), (0.1, 1e-4), (0.3, 1e-5), (0.3, 1e-4)}
    assert {(s["objective.beta"], s["optimizer.lr"]) for s in settings(found)} == pairs
    configs = [found.configure(point)[0] for point in found.grid()]
    assert {(c.objective.beta, c.optimizer.lr) for c in configs} == pairs
    assert all(config.sweep is None for config in configs)


def test_a_logarithmic_range_has_even_ratios_and_stays_within_its_ends(space) -> None:
    found = space("objective.beta={low: 0.01, high: 1, log: true, points: 3}")
    assert [s["objective.beta"] for s in settings(found)] == [0.01, 0.1, 1.0]
    generator = random.Random(0)
    sampled = [found.sample(generator)["objective.beta"] for _ in range(400)]
    assert min(sampled) >= 0.01 and max(sampled) <= 1
    assert 0.4 < sum(value < 0.1 for value in sampled) / 400 < 0.6


def test_whole_numbers_stay_whole(space) -> None:
    found = space("data.max_length={low: 32, high: 35, integer: true, points: 9}")
    assert [s["data.max_length"] for s in settings(found)] == [32, 33, 34, 35]
    assert isinstance(found.configure(next(found.grid()))[0].data.max_length, int)


def test_dotted_keys_in_yaml_equal_nested_ones_on_the_command_line(make_config) -> None:
    dotted = make_config("sweep.space={objective.beta: [0.1], optimizer.lr: {low: 1e-5, high: 1e-4}}")
    nested = make_config("sweep.space.objective.beta=[0.1]", "sweep.space.optimizer.lr={low: 1e-5, high: 1e-4}")
    assert dotted.sweep == nested.sweep


def test_default_spaces(space) -> None:
    beta = [s["objective.beta"] for s in settings(space("objective.beta=default"))]
    assert (beta[0], beta[-1]) == (0.01, 1.0) and 0.1 in beta
    assert [s["optimizer.lr"] for s in settings(space("optimizer.lr=default"))] == [1e-4, 1e-3, 1e-2]
    divergences = settings(space("objective.divergence=default", "!objective={name: f_dpo}"))
    kinds = [s["objective.divergence"] for s in divergences]
    assert set(kinds) == {"reverse_kl", "forward_kl", "jensen_shannon", "alpha"}
    assert {"objective.alpha" in s for s in divergences if s["objective.divergence"] == "alpha"} == {True}
    objectives = [s["objective"]["name"] for s in settings(space("objective=default"))]
    assert {"dpo", "f_dpo", "tdpo", "simpo"} <= set(objectives)
    assert not {"kto", "dqo", "reward_model"} & set(objectives), "other records, or another kind of model"


def test_a_swept_beta_outdoes_the_one_that_comes_with_a_divergence(space) -> None:
    found = space("objective.divergence=default", "objective.beta=[0.7]", "!objective={name: f_dpo}")
    assert {s["objective.beta"] for s in settings(found)} == {0.7}
    alone = space("objective.divergence=default", "!objective={name: f_dpo}")
    assert {s["objective.beta"] for s in settings(alone)} == {0.1, 0.01, 1e-5}


def test_what_a_default_depends_on_can_be_swept(space) -> None:
    found = space("objective.variant=[1,2]", "!objective={name: tdpo}")
    assert [found.configure(point)[0].objective.alpha for point in found.grid()] == [1.0, 0.5]
    found = space("objective.variant=[1,2]", "!objective={name: tdpo, alpha: 0.3}")
    assert [found.configure(point)[0].objective.alpha for point in found.grid()] == [0.3, 0.3]


def test_objectives_differ_in_their_keys(space) -> None:
    found = space("objective.name=[dpo,simpo]", "objective.gamma=[0.2,0.4]")
    applied = [found.configure(point)[1] for point in found.grid()]
    assert applied[:2] == [{"objective.name": "dpo"}] * 2
    assert applied[3] == {"objective.name": "simpo", "objective.gamma": 0.4}
    simpo = found.configure(list(found.grid())[3])[0]
    assert simpo.objective_name == "simpo" and simpo.objective.beta == 0.5, "what the user set is kept"


def test_a_missing_section_is_made_and_lists_are_stepped_into(space) -> None:
    found = space("model.lora.r=[4]", "data.sources.0.path=[other.jsonl]")
    config, _ = found.configure(next(found.grid()))
    assert (config.model.lora.r, config.data.sources[0].path) == (4, "other.jsonl")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.bta=[1]", "sweep.space: objective.bta: unknown key; did you mean beta?"),
        ("nonsense=[1]", "sweep.space: nonsense: unknown key"),
        ("data.sources.7.path=[x]", "sweep.space: data.sources.7.path: there is no such key"),
        ("objective.beta=[-1]", "sweep.space: objective.beta: input should be greater than 0, not -1"),
        ("objective.beta={low: -1, high: 1}", "sweep.space: objective.beta: input should be greater than 0"),
        ("objective.label_smoothing=default", "sweep.space.objective.label_smoothing: has no default space"),
        ("scaling.workers=[1,2]", "sweep.space.scaling.workers: cannot be swept (trials share their workers)"),
        ("sampling.top_k=[1]", "sweep.space.sampling.top_k: cannot be swept (it does not change training)"),
        ("objective.beta=[]", "sweep.space.objective.beta: has no values"),
        ("objective.beta=3", "sweep.space.objective.beta: write a list of values"),
        ("objective.beta={low: 1, high: 0.5}", "low: 1 has to be below high, 0.5"),
        ("objective.beta={low: 0, high: 1, log: true}", "above 0 on a logarithmic scale"),
        ("!sweep.space={}", "sweep.space: is empty; name a key"),
        ("!sweep={space: {objective.beta: [1]}, search: hyperband}", "sweep.search: input should be 'grid', 'random'"),
        ("!sweep={space: {objective.beta: [1]}, scheduler: pbt}", "sweep.scheduler: input should be 'fifo' or 'asha'"),
    ],
)
def test_what_cannot_be_swept_is_one_line(space, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        space(override)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_key_that_no_objective_of_the_sweep_has_is_unknown(space) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.space\.objective\.gamma: no objective of this sweep has it"):
        space("objective.name=[dpo,ipo]", "objective.gamma=[1]")


def test_preparations_show_every_value_that_rows_depend_on(space) -> None:
    found = space(
        "optimizer.lr=[1,2,3]", "data.max_length=[32,64]", "objective.name=[dpo,sft]", "objective.beta=default"
    )
    shown = {
        (p["data.max_length"], p["objective.name"], p["optimizer.lr"], p["objective.beta"])
        for p in found.preparations(grid=False)
    }
    assert shown == {(length, name, 0, 0.01) for length in (0, 1) for name in (0, 1)}
    endless = space("data.max_length={low: 32, high: 64, integer: true, points: 2}")
    assert len(list(endless.preparations(grid=True))) == 2
    with pytest.raises(ConfigError, match=r"rows are prepared before trials start; write a list"):
        list(endless.preparations(grid=False))
