"""Attention without padding, against the same rule written as one mask over all tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import attention
from pipeline.attention import BUNDLE, Group, group_attention, pack, plan

LONG = (300, 200, 100, 7)  # a group of its own; its first response alone, the others under one mask
TWO = (250, 10, 20)
SMALL = [(3, 2, 1), (1,), (5, 4)]  # all in one bundle


def sees(groups: list[Group], window: int) -> torch.Tensor:
    """The rule, query by query and key by key: [N, N]."""
    tokens = []
    for row, (prompt, *responses) in enumerate(groups):
        tokens += [(row, 0, t) for t in range(prompt)]
        tokens += [(row, k, prompt + t) for k, n in enumerate(responses, 1) for t in range(n)]
    places = range(len(tokens))
    return torch.tensor(
        [
            [
                key <= query
                and tokens[key][0] == tokens[query][0]
                and tokens[key][1] in (0, tokens[query][1])
                and not (window and tokens[query][2] - tokens[key][2] >= window)
                for key in places
            ]
            for query in places
        ]
    )


def plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scale: float
) -> torch.Tensor:
    """[1, H, N, D] ×2, [1, G, N, D] → [1, N, H, D], by softmax over all keys."""
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def drawn(tokens: int, heads: int, dtype: torch.dtype = torch.float64, width: int = 8) -> torch.Tensor:
    """As a projection leaves them: [1, H, N, D], heads of a token next to each other in memory."""
    return torch.randn(1, tokens, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()


@given(
    st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4),
    st.sampled_from([0, 0, 5]),
    st.sampled_from([(2, 2), (4, 2)]),
)
@settings(max_examples=10)
@example([LONG, *SMALL, TWO], 0, (4, 2))
@example([TWO, (260,), LONG], 0, (2, 2))
@example([LONG, *SMALL], 40, (2, 2))
def test_output_and_gradients_are_those_of_one_mask(groups: list[Group], window: int, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    tokens = sum(map(sum, groups))
    tensors = drawn(tokens, heads[0]), drawn(tokens, heads[1]), drawn(tokens, heads[1])
    weight = torch.randn(1, tokens, heads[0], 8, dtype=torch.float64)
    found, _ = group_attention(torch.nn.Module(), *tensors, pack(groups, window or None), scaling=0.3)
    expected = plainly(*tensors, sees(groups, window), 0.3)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), tensors) for x in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_each_precision_keeps_its_rounding(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    groups = [LONG, TWO, *SMALL]
    tokens = sum(map(sum, groups))
    tensors = [drawn(tokens, 2, dtype) for _ in range(3)]
    found, _ = group_attention(torch.nn.Module(), *tensors, pack(groups, None))
    assert found.dtype == dtype
    exact = plainly(*(x.double() for x in tensors), sees(groups, 0), 8**-0.5)
    torch.testing.assert_close(found.double(), exact, atol=bound, rtol=bound)
    grads = torch.autograd.grad(found.double().square().sum(), tensors)
    for one, other in zip(grads, torch.autograd.grad(exact.square().sum(), tensors), strict=True):
        torch.testing.assert_close(one, other, atol=4 * bound, rtol=4 * bound)


def test_no_score_is_computed_between_groups_or_responses_that_are_long() -> None:
    def scores(groups: list[Group]) -> int:
        blocks = [b for sight in plan(tuple(groups), 0, torch.float32) for b in (sight.block, *sight.own)]
        return sum((b.stop - b.start) * (b.last - b.first) for b in blocks)

    assert scores([LONG]) == 300**2 + 307 * 300 + 200**2 + 107**2
    assert scores([LONG, LONG]) == 2 * scores([LONG])
    assert scores([TWO]) == 250**2 + 30 * 250 + 30**2
    assert scores(SMALL) == 16**2 and sum(map(sum, SMALL)) <= BUNDLE


def test_a_window_that_hides_nothing_costs_nothing() -> None:
    blocks = [
        [b.queries for sight in plan((LONG, TWO), window, torch.float32) for b in (sight.block, *sight.own)]
        for window in (500, 0, 499)
    ]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 7
    assert blocks[2] == [slice(0, sum(LONG)), slice(sum(LONG), sum(LONG) + sum(TWO))], "the last of its keys is hidden"


@pytest.mark.parametrize("widths", [(8, 5), (5, 8)])
def test_heads_of_values_may_have_another_width(widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    tokens = sum(LONG)
    tensors = [drawn(tokens, 2, width=width) for width in (widths[0], widths[0], widths[1])]
    found, _ = group_attention(torch.nn.Module(), *tensors, pack([LONG], None))
    expected = plainly(*tensors, sees([LONG], 0), widths[0] ** -0.5)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    ours, theirs = (torch.autograd.grad(x.square().sum(), tensors) for x in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_numbers_of_a_head_need_not_lie_next_to_each_other() -> None:
    """The kernels would read whatever does."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 8, sum(TWO), dtype=torch.float64).transpose(2, 3) for _ in range(3))
    found, _ = group_attention(torch.nn.Module(), query, key, value, pack([TWO], None), scaling=0.3)
    torch.testing.assert_close(found, plainly(query, key, value, sees([TWO], 0), 0.3), atol=1e-12, rtol=1e-12)


def test_an_ordinary_mask_is_left_to_sdpa() -> None:
    torch.manual_seed(0)
    query, key, value = (drawn(6, 2) for _ in range(3))
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    found, _ = group_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, plainly(query, key, value, mask[0, 0], 0.3))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_has_no_form_here_is_refused(name: str) -> None:
    query, key, value = (drawn(3, 1) for _ in range(3))
    with pytest.raises(ValueError, match=name):
        group_attention(torch.nn.Module(), query, key, value, attention.pack([(2, 1)], None), **{name: 1.0})
