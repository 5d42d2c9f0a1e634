"""Packing rows into a Batch: worked by hand, then as properties."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.collate import collate, group_mask
from pipeline.contracts import Row

WORKED = Row(7, [1, 2], [[3, 4, 5], [6]], [[-0.1, -0.2, -0.3], [-0.4]], weight=0.5)


def test_one_row_by_hand() -> None:
    batch = collate([WORKED])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2]]
    assert batch.segment.tolist() == [[0, 0, 1, 1, 1, 2]]
    assert batch.predictor.tolist() == [[[1, 2, 3], [1, 0, 0]]]
    assert batch.response_ids.tolist() == [[[3, 4, 5], [6, 0, 0]]]
    assert batch.response_mask.tolist() == [[[True, True, True], [True, False, False]]]
    torch.testing.assert_close(batch.ref_logprobs, torch.tensor([[[-0.1, -0.2, -0.3], [-0.4, 0.0, 0.0]]]))
    assert batch.weight.tolist() == [0.5]
    assert batch.row_ids.tolist() == [7]


def test_environment_tokens_are_context_and_masked() -> None:
    row = Row(
        0,
        [1, 2],
        [[3, 4, 5], [6]],
        trained=[[True, False, True], [True]],
        token_rewards=[[0.5, 0.25, 1.0], [-1.0]],
        behaviour_logprobs=[-2.0, None],
    )
    batch = collate([row, Row(1, [1], [[7, 8]])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6], [1, 7, 8, 0, 0, 0]]
    assert batch.segment.tolist()[0] == [0, 0, 1, 1, 1, 2]
    assert batch.position_ids.tolist()[0] == [0, 1, 2, 3, 4, 2]
    assert batch.predictor.tolist()[0] == [[1, 2, 3], [1, 0, 0]]
    assert batch.response_mask.tolist() == [
        [[True, False, True], [True, False, False]],
        [[True, True, False], [False, False, False]],
    ]
    assert batch.valid.tolist() == [[True, True], [True, False]]
    assert batch.token_rewards.tolist() == [[[0.5, 0.25, 1.0], [-1.0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]
    assert batch.returns.tolist() == [[1.75, -1.0], [0, 0]]
    assert batch.behaviour_logprobs[0, 0] == -2.0
    assert batch.behaviour_logprobs.isnan().tolist() == [[False, True], [True, True]]


def test_what_no_row_has_is_no_tensor() -> None:
    batch = collate([WORKED])
    assert (batch.token_rewards, batch.behaviour_logprobs) == (None, None)


def test_a_mismatched_response_is_computed_and_not_counted() -> None:
    batch = collate([Row(0, [1], [[2, 3], [4]], mismatched=True), Row(1, [1], [[5], [6], [7]])])
    assert batch.response_mask.sum(-1).tolist() == [[2, 1, 0], [1, 1, 1]]
    assert batch.valid.tolist() == [[True, False, False], [True, True, True]]


def test_a_response_without_a_token_to_train_on_is_not_valid() -> None:
    assert collate([Row(0, [1], [[2, 3], [4]], trained=[[False, False], [True]])]).valid.tolist() == [[False, True]]


def test_mask_by_hand() -> None:
    seen = group_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],  # response 2 sees the prompt and itself, not response 1
        [1, 1, 0, 0, 0, 1],  # padding sees itself: a query without keys would be nan
    ]


tokens = st.lists(st.integers(1, 99), min_size=1, max_size=9)
rows = st.builds(lambda prompt, responses: Row(0, prompt, responses), tokens, st.lists(tokens, min_size=1, max_size=4))


@given(st.lists(rows, min_size=1, max_size=5))
def test_every_token_keeps_its_place_and_its_predictor(group: list[Row]) -> None:
    batch = collate(group)
    for b, row in enumerate(group):
        assert batch.valid[b].sum() == len(row.response_ids)
        for k, response in enumerate(row.response_ids):
            n = len(response)
            assert batch.response_ids[b, k, :n].tolist() == response
            assert batch.response_mask[b, k].sum() == n
            context = []
            for t in range(n):
                at = int(batch.predictor[b, k, t])
                # what the predicting position may see is exactly prompt + earlier response tokens, in order
                visible = group_mask(batch.segment)[b, 0, at].nonzero().squeeze(-1)
                context = batch.input_ids[b, visible].tolist()
                assert context == row.prompt_ids + response[:t]
                assert batch.position_ids[b, visible].tolist() == list(range(len(context)))
