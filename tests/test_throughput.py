"""The throughput benchmark: its arithmetic by worked examples, and (drills) all of it with a tiny model."""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.throughput import __main__ as command
from benchmarks.throughput import race, report, startup
from benchmarks.throughput.memory import PeakPss, peak_resident, reset_peak
from benchmarks.throughput.pace import Pace
from benchmarks.throughput.padded import pad, plackett_luce, tdpo, token_logprobs
from benchmarks.throughput.prepare import page, write_records
from benchmarks.throughput.products import Layout, Product, Recorder, seconds_alone
from benchmarks.throughput.race import RaceError, Result, refuse_other_rows
from benchmarks.throughput.tasks import Task, digests, expected, tokens, write_rows
from benchmarks.throughput.verdicts import agreement, agrees, judge, paired, ratios
from benchmarks.throughput.workloads import (
    CONTENDERS,
    RESERVED_IDS,
    SCALING,
    W1,
    W2,
    W3,
    W4,
    WORKLOADS,
    Entry,
    Group,
    Target,
    named,
)

OURS, OTHER = Entry("ours-fp32", "ours", reference="cached"), Entry("trl-fp32", "trl")


def results(**changes) -> dict[str, Result]:
    """Two contenders: four steps (the first one a warm-up), and equal numbers but for `changes` of ours."""
    logprobs = {"0": [-10.0, -20.0], "1": [-5.0, -8.0]}
    same = {"losses": [0.7] * 5 + [0.5], "grad_norms": [2.0] * 6, "logprobs": logprobs}
    ours = Result(OURS, seconds=[9.0, 1.0, 2.0, 4.0], peak_rss=3, tree_pss=2 * 2**30, **(same | changes))
    return {"ours-fp32": ours, "trl-fp32": Result(OTHER, seconds=[9.0, 8.0, 10.0, 12.0], peak_rss=10, **same)}


# --------------------------------------------------------------------------------------------------- rows


def test_rows_follow_from_the_name_and_keep_to_their_bounds() -> None:
    steps = W1.steps(30)
    assert steps == W1.steps(40)[:30], "the number of steps that are drawn changes no row"
    groups = [group for step in steps for group in step]
    assert {len(step) for step in steps} == {4} and {len(group.responses) for group in groups} == {2}
    prompts = [len(group.prompt) for group in groups]
    answers = [len(response) for group in groups for response in group.responses]
    assert min(prompts) >= 64 and max(prompts) <= 400 and 240 < np.mean(prompts) < 272
    assert min(answers) >= 16 and max(answers) <= 320 and 85 < np.median(answers) < 107
    assert min(min(group.prompt) for group in groups) >= RESERVED_IDS
    assert max(max(group.prompt) for group in groups) < W1.vocabulary


def test_a_ranking_has_six_pairs_best_first() -> None:
    a, b, c, d = [1], [2], [3], [4]
    assert Group([9], [a, b, c, d]).pairs() == [(a, b), (a, c), (a, d), (b, c), (b, d), (c, d)]


@pytest.mark.parametrize("workload", [*WORKLOADS.values(), SCALING], ids=lambda workload: workload.name)
def test_targets_and_agreement_speak_of_contenders_that_run(workload) -> None:
    names = {entry.name for entry in workload.entries}
    assert len(names) == len(workload.entries)
    assert {name for t in workload.targets for name in (t.ours, t.other)} <= names | {None}
    assert set(workload.agreement) <= names
    assert {workload.entry(name).precision for name in workload.agreement} == {"float32"}
    for entry in workload.entries:
        module, name = CONTENDERS[entry.contender].split(":")
        assert entry.contender == "trl" or callable(getattr(import_module(module), name))


def test_the_targets_are_the_issues() -> None:
    bounds = {workload.name: [(t.measure, t.bound) for t in workload.targets] for workload in (W1, W2, W3, W4, SCALING)}
    assert bounds == {
        "w1": [("time", 8.0), ("time", 12.0), ("time", 6.0), ("memory", 0.35), ("products", 0.7)],
        "w2": [("time", 2.0)],
        "w3": [("time", 6.0), ("time", 6.0)],
        "w4": [("time", 5.0)],
        "scaling": [("time", 1.7)] * 3,
    }


def test_a_task_and_its_rows_survive_the_way_to_a_child(tmp_path: Path) -> None:
    task = Task(str(tmp_path), "w3", "padded-fp32", steps=2, threads=1, quick=True)
    write_rows(tmp_path, task.workload, steps=3, timed=2, watched=1)
    again = Task.parse(task.dump())
    assert again == task and again.groups() == named("w3", quick=True).steps(2)
    assert again.entry.contender == "padded"


def test_watched_steps_repeat_the_middle_one_of_those_that_are_timed(tmp_path: Path) -> None:
    task = Task(str(tmp_path), "w1", "ours-fp32", steps=9, threads=1, quick=True)
    write_rows(tmp_path, task.workload, steps=7, timed=3, watched=2)
    rows = task.groups()
    assert rows[:7] == task.workload.steps(7)
    assert sorted(map(tokens, rows[4:7]))[1] == tokens(rows[7]) and rows[7] == rows[8]


def test_hashes_tell_where_a_prompt_ends_and_forget_order_and_repeats() -> None:
    first, second = ([1, 2], [3]), ([1], [2, 3])
    assert digests([first, second, first]) == digests([second, first])
    assert digests([first]) != digests([second])
    group = Group([1, 2], [[3], [4, 5]])
    assert expected([group]) == digests([([1, 2], [4, 5]), ([1, 2], [3])])


def test_other_rows_are_refused() -> None:
    rows = ["a", "b", "c"]
    refuse_other_rows("two", [{"seen": ["a", "b"]}, {"seen": ["b", "c"]}], rows)
    for wrong in ([{"seen": ["a", "b"]}], [{"seen": ["a", "b", "c", "d"]}]):
        with pytest.raises(RaceError, match=r"^one: it saw other token ids"):
            refuse_other_rows("one", wrong, rows)


# ----------------------------------------------------------------------------------------------- verdicts


def test_ratios_are_medians_of_rounds() -> None:
    found = results()
    spread = paired(found["ours-fp32"], found["trl-fp32"], steps=3)  # 8 / 1, 10 / 2, 12 / 4
    assert (spread.median, spread.low, spread.high) == (5.0, 3.0, 8.0)
    assert paired(found["ours-fp32"], found["trl-fp32"], steps=4).low == 1.0, "with the warm-up"


def test_equal_precision_comes_first() -> None:
    found = results()
    bf16 = replace(OURS, name="ours-bf16", precision="bfloat16")
    found = {"ours-bf16": Result(bf16, seconds=[1.0] * 4, peak_rss=5)} | found
    listed = ratios(found, steps=3)
    assert [(r.ours, r.alike, r.memory) for r in listed] == [("ours-fp32", True, 0.3), ("ours-bf16", False, 0.5)]


def test_targets_are_met_from_the_right_side() -> None:
    products = {"seconds": 1.5, "calls": 1, "distinct": 1, "dearest": []}
    targets = (
        Target("time", "ours-fp32", "trl-fp32", 5.0),
        Target("time", "ours-fp32", "trl-fp32", 5.1),
        Target("memory", "ours-fp32", "trl-fp32", 0.3),
        Target("memory", "ours-fp32", "trl-fp32", 0.29),
        Target("products", "ours-fp32", None, 0.75),
        Target("products", "ours-fp32", None, 0.76),
    )
    verdicts = judge(replace(W1, targets=targets), results(products=products, again=[2.5, 2.0, 9.0]), steps=3)
    assert [v.value for v in verdicts] == [5.0, 5.0, 0.3, 0.3, 0.75, 0.75]
    assert [v.met for v in verdicts] == [True, False, True, False, True, False]


@pytest.mark.parametrize(
    ("changes", "what", "difference"),
    [
        ({"logprobs": {"0": [-10.0, -20.02], "1": [-5.0, -8.0]}}, "log-probs of the first step's sequences", 1e-3),
        ({"losses": [0.707] + [0.7] * 4 + [0.5]}, "loss", 1e-2),
        ({"grad_norms": [2.02] + [2.0] * 5}, "gradient norm", 1e-2),
        ({"losses": [0.7] * 5 + [0.505]}, "loss after 5 steps", 1e-2),
        ({"losses": [math.nan] + [0.7] * 4 + [0.5]}, "loss", math.nan),
    ],
)
def test_each_disagreement_is_seen_alone(changes, what: str, difference: float) -> None:
    assert agreement(W1, results()) == dict.fromkeys(agreement(W1, results()), 0.0)
    assert agrees(agreement(W1, results()))
    found = agreement(W1, results(**changes))
    assert found.pop(what) == pytest.approx(difference, nan_ok=True)
    assert set(found.values()) == {0.0}
    assert not agrees(agreement(W1, results(**changes)))


def test_the_page_states_what_was_compared() -> None:
    workload = replace(W1, targets=(Target("time", "ours-fp32", "trl-fp32", 5.1),))
    text = report.section(workload, results(grad_norms=[9.0] * 6, peak_since_first_step=False), steps=3, threads=2)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    row = ["ours-fp32", "fp32", "no", "cached", "1 × 2", "2.000", "1.000–4.000", "2.00", "0.00", "2.00"]
    assert row in cells
    assert ["ours-fp32", "trl-fp32", "yes", "5.00", "3.00–8.00", "0.30"] in cells
    assert ["ours-fp32 ≥ 5.1 × as fast as trl-fp32", "5.00", "missed"] in cells
    assert ["gradient norm", "3.5e+00", "NO"] in cells and ["loss", "0.0e+00", "yes"] in cells
    assert "DISAGREE" in text and "cannot reset" in text


# --------------------------------------------------------------------------------------------- in a child


def test_a_contender_is_paced_line_by_line() -> None:
    requests = io.StringIO('{"do": "step"}\n{"do": "step"}\n')
    answers = io.StringIO()
    pace, seen = Pace(requests, answers), []
    while pace.begin():  # the end of the input is a stop, too: no child outlives its parent
        seen.append(len(seen))
        pace.end(0.5, 2.0, lambda: ["a", "b"])
    pace.finish()
    first, second, last = map(json.loads, answers.getvalue().splitlines())
    assert seen == [0, 1] and second.keys() == first.keys()
    assert first.pop("seconds") > 0 and first == {"loss": 0.5, "grad_norm": 2.0, "seen": ["a", "b"]}
    assert last["peak_rss"] > 2**20


def test_memory_is_seen_while_it_is_held() -> None:
    assert reset_peak() in (True, False)
    before = peak_resident()
    with PeakPss([os.getpid()], every=0.001) as peak:
        held = np.ones(8 * 2**20)  # 64 MiB
        until = time.monotonic() + 5
        while peak.bytes < held.nbytes and time.monotonic() < until:
            time.sleep(0.001)
        del held
    assert peak_resident() >= before
    assert peak.bytes > 64 * 2**20


def test_every_matrix_product_is_recorded_with_its_layout() -> None:
    x, w = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    with Recorder() as recorder:
        (x @ w.T).sum().backward()
    shapes = {(p.left.shape, p.right.shape): n for p, n in recorder.calls.items()}
    assert shapes == {((3, 4), (4, 5)): 1, ((4, 3), (3, 5)): 1, ((3, 5), (5, 4)): 1} or shapes == {
        ((3, 4), (4, 5)): 1,
        ((5, 3), (3, 4)): 1,
        ((3, 5), (5, 4)): 1,
    }
    forward = Product(Layout((3, 4), (4, 1)), Layout((4, 5), (1, 4)), torch.float32)
    assert recorder.calls[forward] == 1, "a transposed weight is read as it lies in memory"


def test_a_bias_is_no_operand_of_the_product() -> None:
    with Recorder() as recorder:
        torch.addmm(torch.ones(2), torch.ones(3, 4), torch.ones(4, 2))
    assert dict(recorder.calls) == {Product(Layout((3, 4), (4, 1)), Layout((4, 2), (2, 1)), torch.float32): 1}


def test_products_inside_attention_are_counted_with_their_gradients() -> None:
    query, key, value = (torch.randn(2, 3, 6, 4, requires_grad=True) for _ in range(3))
    for causal, share in ((False, 1.0), (True, 0.5)):
        with Recorder() as recorder:
            scaled_dot_product_attention(query, key, value, is_causal=causal).sum().backward()
        assert {product.share for product in recorder.calls} == {share}
        assert sum(n for p, n in recorder.calls.items() if p.left.shape == (6, 6, 4)) == 3  # QKᵀ twice, by P
        assert sum(n for p, n in recorder.calls.items() if p.left.shape == (6, 6, 6)) == 4  # PV; by V, Q, K


def test_products_alone_add_up() -> None:
    small = Product(Layout((2, 3), (3, 1)), Layout((3, 2), (1, 3)), torch.float32)
    broadcast = Product(Layout((2, 2, 3), (0, 3, 1)), Layout((2, 3, 2), (6, 2, 1)), torch.float32, 0.5)
    found = seconds_alone(Counter({small: 4, broadcast: 1}))
    assert (found["calls"], found["distinct"]) == (5, 2)
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in found["dearest"])) and found["seconds"] > 0


# ------------------------------------------------------------------------------------------ plain PyTorch


def test_padded_rows_and_their_masks() -> None:
    ids, lengths, answers = pad([Group([7, 8], [[1], [2, 3]]), Group([9], [[4], [5]])])
    assert ids.tolist() == [[7, 8, 1, 0], [7, 8, 2, 3], [9, 4, 0, 0], [9, 5, 0, 0]]
    assert lengths.tolist() == [3, 4, 2, 2]
    assert answers.tolist() == [[False, True, False], [False, True, True], [True, False, False], [True, False, False]]


def test_padded_plackett_luce_of_two_is_dpo() -> None:
    logits, ids, answers = _four_rows()
    loss = plackett_luce(logits, torch.zeros_like(logits), ids, answers, 2, {"beta": 0.5})
    ratio = ((token_logprobs(logits, ids) + math.log(3)) * answers).sum(-1)
    margins = 0.5 * (ratio[0::2] - ratio[1::2])
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(margins).mean())


def test_padded_tdpo_is_dpo_at_alpha_0_and_stops_the_chosen_kl() -> None:
    logits, ids, answers = _four_rows()
    reference = logits.detach().flip(-1)
    settings = {"beta": 0.5, "alpha": 0.0, "variant": 2}
    dpo = plackett_luce(logits, reference, ids, answers, 2, settings)
    torch.testing.assert_close(tdpo(logits, reference, ids, answers, 2, settings), dpo)
    by_alpha = [
        torch.autograd.grad(tdpo(logits, reference, ids, answers, 2, settings | {"alpha": a}), logits)[0]
        for a in (0.0, 1.0)
    ]
    # Row 0 is chosen: its gradient only changes by the common factor σ(−margin), not in direction.
    chosen = [gradient[0].flatten() / gradient[0].norm() for gradient in by_alpha]
    rejected = [gradient[1].flatten() / gradient[1].norm() for gradient in by_alpha]
    torch.testing.assert_close(chosen[0], chosen[1])
    assert (rejected[0] - rejected[1]).norm() > 0.01


def _four_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two pairs over a vocabulary of 3: logits [4, 3, 3], ids [4, 4], answers [4, 3]."""
    ids, _, answers = pad([Group([2, 1], [[1], [2, 0]]), Group([1], [[0, 2, 1], [2]])])
    logits = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return logits, ids, answers


# ------------------------------------------------------------------------------------------------ command


def test_without_trl_one_line_names_the_extra(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main(["--workloads", "w4", "w1", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: trl is not installed; pip install 'qalign[throughput]'\n"


def test_enough_rounds_for_the_loss_after_five_steps() -> None:
    assert (race.rounds(2), race.rounds(10)) == (6, 12)


def test_records_are_distinct_pairs(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", 1001)
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(records) == 1001 and len({record["prompt"] for record in records}) == 1001
    assert all(record["chosen"][0] == record["rejected"][0] == " " for record in records)


def test_the_prepare_page_has_both_ratios() -> None:
    side = {"tokens": 5, "digest": "x", "tree_pss": 2**30}
    sides = {
        "ours": side | {"seconds": 4.0, "loading": 0.0},
        "map": side | {"seconds": 10.0, "loading": 2.0},
        "map_batched": side | {"seconds": 3.0, "loading": 2.0},
    }
    more = {name: found | {"tree_pss": 2**31} for name, found in sides.items()}
    text = page({"100": sides, "1000": more})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert ["qalign prepare", "25", "4.0", "–", "", "", "1.00"] in cells
    assert ["datasets.map(num_proc=2), row by row", "10", "10.0", "2.0", "2.50 ×", "2.00 ×", "1.00"] in cells
    assert "from 100 to 1000 rows: 2.00 ×" in text


def test_the_start_up_page_says_where_the_seconds_go() -> None:
    places = {"ray": 5.0, "found": 9.0, "worker": 11.0, "step": 14.0, "end": 20.0}
    runs = [places, {place: seconds + 3.0 for place, seconds in places.items()}]
    text = startup.page(runs)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert ["first optimizer step", "15.5", "14.0–17.0", "3.0"] in cells
    assert "first step at most 15 s after the command: missed" in text
    assert "met" in startup.page([places])


# ------------------------------------------------------------------------------------------------- drills


@pytest.mark.slow
def test_quick_race_agrees_and_reports_everything(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    workloads = ["w1", "w3", "w4"]
    status = command.main(["--quick", "--threads", "1", "--workloads", *workloads, "--output", str(tmp_path)])
    assert status == 0
    found = json.loads((tmp_path / "results.json").read_text())["workloads"]
    text = (tmp_path / "report.md").read_text()
    assert list(found) == workloads
    for name, result in found.items():
        workload = named(name, quick=True)
        assert result["agreement"].keys() == agreement(W1, results()).keys()
        assert max(result["agreement"].values()) < 1e-4
        assert all(ratio["time"]["low"] > 0 and ratio["memory"] > 0 for ratio in result["ratios"])
        assert len(result["targets"]) == len(workload.targets)
        for entry in workload.entries:
            one = result["results"][entry.name]
            assert len(one["seconds"]) == 6 and min(one["seconds"]) > 0
            assert one["peak_rss"] > one["tree_pss"] / 4 > 2**20
            assert one["losses"][0] != pytest.approx(math.log(2), abs=1e-4), "policy and reference differ"
            assert f"| {entry.name} " in text
        ours = result["results"]["ours-fp32"]
        assert abs(ours["losses"][5] - ours["losses"][0]) > 1e-4, "five steps change something"
    products = found["w1"]["results"]["ours-fp32"]["products"]
    assert products["calls"] > 2 * 7 * 3 and products["seconds"] > 0
    assert "Self CPU" in (tmp_path / "w1-profile-ours-fp32.txt").read_text()


@pytest.mark.slow
def test_quick_scaling_makes_the_same_update_with_two_workers(tmp_path: Path) -> None:
    assert command.main(["scaling", "--quick", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "scaling.json").read_text())["workloads"]["scaling"]
    assert max(found["agreement"].values()) < 1e-4
    assert found["targets"][0]["value"] > 0
    assert "2 × 1" in (tmp_path / "scaling.md").read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_one_start_up_comes_by_all_places_in_order(tmp_path: Path) -> None:
    assert command.main(["startup", "--quick", "--output", str(tmp_path)]) == 0
    (seconds,) = json.loads((tmp_path / "startup.json").read_text())["runs"]
    reached = [seconds[place] for place in startup.PLACES]
    assert reached == sorted(reached) and reached[0] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_quick_prepare_makes_the_same_tokens_on_both_sides(tmp_path: Path) -> None:
    assert command.main(["prepare", "--quick", "--output", str(tmp_path)]) == 0
    (sides,) = json.loads((tmp_path / "prepare.json").read_text()).values()
    assert sides.keys() == {"ours", "map", "map_batched"}
    assert len({side["tokens"] for side in sides.values()}) == 1
    assert all(side["seconds"] > 0 and side["tree_pss"] > 2**26 for side in sides.values())
