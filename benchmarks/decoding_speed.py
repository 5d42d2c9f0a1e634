"""How fast is decoding? `python -m benchmarks.decoding_speed --model package:smollm2`

Side by side in one run, in turns, on the same prompts (random tokens) and with the same result:

    recompute   the straightforward algorithm for value-guided decoding: per prompt, per token and per candidate, a greedy
                roll-out in which every step runs the model over the whole sequence
    restart     the shape of Transfer-Q's released code: per prompt and token one `generate` over all candidates, which keeps a
                cache of its own, from the prompt's first token each time
    qalign      our `transfer_q`: all prompts at once, caches forked

    generate    transformers' beam search, prompts as one batch        qalign   our `beam`, likewise

Both sides score with the same trivial function: what is measured is the language model's work. Wall and CPU times are medians
of `--repeats` turns. Equality is by tokens; in low precision a near-tie may fall the other way, so that the share is printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.config import DecodingConfig, SamplingConfig
from pipeline.decoding import beam, transfer_q
from pipeline.decoding.contract import Prompt, Tools
from pipeline.model_files import locate
from pipeline.pretrained import load_causal_lm, precision

Run = Callable[[], list[list[int]]]


class Work(NamedTuple):
    """Greedy value-guided decoding of some prompts."""

    reference: nn.Module
    baseline: nn.Module
    prompts: list[list[int]]
    new: int
    candidates: int
    rollout: int
    alpha: float
    ends: tuple[int, ...] = ()


def score(responses: Sequence[Sequence[int]]) -> Tensor:
    """A reward that looks at every token and costs nothing: the mean of a hash of each, [n] in 0 … 1."""
    return torch.tensor([sum(t * 2654435761 % 1009 for t in r) / 1009 / len(r) for r in responses], dtype=torch.float64)


def recompute(work: Work) -> list[list[int]]:
    """No cache anywhere."""
    return [_guided(work, prompt, _each_uncached) for prompt in work.prompts]


def restart(work: Work) -> list[list[int]]:
    """A cache within each `generate`, thrown away after it."""
    return [_guided(work, prompt, _rolled_by_generate) for prompt in work.prompts]


Roll = Callable[[Work, list[int], list[list[int]], int], list[list[int]]]
"""(work, prompt, beginnings of responses, tokens to add to each) → the longer responses."""


@torch.inference_mode()
def _guided(work: Work, prompt: list[int], roll: Roll) -> list[int]:
    response: list[int] = []
    while len(response) < work.new and (not response or response[-1] not in work.ends):
        logits = work.reference(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, -1].float()
        top = logits.log_softmax(-1).topk(work.candidates)
        room = min(work.rollout, work.new - len(response) - 1)
        whole = roll(work, prompt, [[*response, token] for token in top.indices.tolist()], room)
        response.append(int(top.indices[(top.values + score(whole).float() / work.alpha).argmax()]))
    return response


def _each_uncached(work: Work, prompt: list[int], begun: list[list[int]], room: int) -> list[list[int]]:
    return [_rolled_uncached(work, prompt, response, room) for response in begun]


def _rolled_uncached(work: Work, prompt: list[int], response: list[int], room: int) -> list[int]:
    for _ in range(room):
        if response[-1] in work.ends:
            break
        logits = work.baseline(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, -1]
        response = [*response, int(logits.argmax())]
    return response


def _rolled_by_generate(work: Work, prompt: list[int], begun: list[list[int]], room: int) -> list[list[int]]:
    """One batch; what is behind an end is padding."""
    going = [response for response in begun if room and response[-1] not in work.ends]
    if not going:
        return begun
    ids = torch.tensor([prompt + response for response in going])
    out = work.baseline.generate(
        ids, max_new_tokens=room, do_sample=False, eos_token_id=list(work.ends), pad_token_id=0
    )
    longer = iter(_up_to_end(row, work.ends) for row in out[:, len(prompt) :].tolist())
    return [next(longer) if response in going else response for response in begun]


def _up_to_end(response: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((n for n, token in enumerate(response, start=1) if token in ends), len(response))
    return response[:stop]


def ours(work: Work) -> list[list[int]]:
    """The same work by `transfer_q` with greedy roll-outs."""
    rows = len(work.prompts) * work.candidates
    settings = SamplingConfig(max_new_tokens=work.new, temperature=0, batch_size=rows)
    options = DecodingConfig(
        candidates=work.candidates,
        rollouts=1,
        rollout_tokens=work.rollout,
        rollout_temperature=0,
        alpha=work.alpha,
    )
    models = {"reference": work.reference, "baseline": work.baseline}
    tools = Tools(settings, options, work.ends, 0, models, {"scorer": lambda prompts, responses: score(responses)})
    return [c.token_ids for c in transfer_q.decode(tools, _named(work.prompts))]


def _named(prompts: list[list[int]]) -> list[Prompt]:
    return [Prompt(prompt, key) for key, prompt in enumerate(prompts)]


def beams_of_transformers(model: nn.Module, prompts: list[list[int]], new: int, beams: int, ends: Sequence[int]) -> Run:
    """Prompts of one length."""
    ids = torch.tensor(prompts)
    shape = {"max_new_tokens": new, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, **shape, eos_token_id=list(ends))[:, ids.shape[1] :].tolist()


def our_beams(model: nn.Module, prompts: list[list[int]], new: int, beams: int, ends: Sequence[int]) -> Run:
    settings = SamplingConfig(max_new_tokens=new, batch_size=len(prompts) * beams)
    tools = Tools(settings, DecodingConfig(beams=beams), ends, 0, {"policy": model})
    return lambda: [c.token_ids for c in beam.search(tools, _named(prompts))]


# ------------------------------------------------------------------------------------------------- command


class Times(NamedTuple):
    """One turn, seconds."""

    wall: float
    cpu: float  # of all threads: on a shared machine the steadier of the two


def race(runs: dict[str, Run], repeats: int) -> None:
    """Run all in turns; print tokens per second, times and their ratios to the last one's, and the share of equal responses."""
    times: dict[str, list[Times]] = {name: [] for name in runs}
    results: dict[str, list[list[int]]] = {}
    for turn in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter(), time.process_time()
            results[name] = run()
            found = Times(time.perf_counter() - started[0], time.process_time() - started[1])
            times[name].append(found)
            print(
                f"  turn {turn + 1}: {name} {found.wall:.1f} s, {found.cpu:.1f} s of CPU", file=sys.stderr, flush=True
            )
    *_, last = runs
    ours = _median(times[last])
    tokens = sum(len(response) for response in results[last])
    for name in runs:
        own = _median(times[name])
        equal = [a[: len(b)] == b for a, b in zip(results[name], results[last], strict=True)]
        print(
            f"  {name:10} {tokens / own.wall:9.2f} tokens/s   {own.wall:8.2f} s = {own.wall / ours.wall:6.2f} × ours   "
            f"CPU {own.cpu:8.2f} s = {own.cpu / ours.cpu:6.2f} × ours   {sum(equal)}/{len(equal)} equal"
        )


def _median(turns: Sequence[Times]) -> Times:
    return Times(*(statistics.median(values) for values in zip(*turns, strict=True)))


def main() -> int:
    """Parse the command line, load, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:smollm2")
    parser.add_argument("--storage", default="outputs")
    parser.add_argument("--prompts", type=int, default=8, help="for guided decoding")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--rollout", type=int, default=16)
    parser.add_argument("--beam-prompts", type=int, default=32)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=["guided", "beam"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = load_causal_lm(locate(given.model, Path(given.storage) / "cache"), precision("float32"))
    generator = torch.Generator().manual_seed(0)
    count = max(given.prompts, given.beam_prompts)
    size = model.config.get_text_config().vocab_size
    prompts = torch.randint(3, size, (count, given.prompt_tokens), generator=generator).tolist()
    if given.only != "beam":
        work = Work(model, model, prompts[: given.prompts], given.new, given.candidates, given.rollout, alpha=0.1)
        print(f"guided: {given}")
        runs = {"recompute": lambda: recompute(work), "restart": lambda: restart(work), "qalign": lambda: ours(work)}
        race(runs, given.repeats)
    if given.only != "guided":
        shape = (model, prompts[: given.beam_prompts], given.new, given.beams, [2])
        print(f"beam: {given.beam_prompts} prompts, {given.beams} beams, {given.new} tokens")
        race({"generate": beams_of_transformers(*shape), "qalign": our_beams(*shape)}, given.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
