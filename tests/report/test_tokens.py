from __future__ import annotations

import pytest

from pipeline.evaluation.results import CreditResponse, CreditRow
from pipeline.report.tokens import LEVELS, MOST_ROWS, MOST_TOKENS, heatmap, level


def row(values: list[float | None], **more) -> CreditRow:
    tokens = [f" t{i}" for i in range(len(values))]
    return CreditRow(
        row_id=1, prompt="p", responses=[CreditResponse(label="chosen", tokens=tokens, values={"r": values}, **more)]
    )


@pytest.mark.parametrize(
    ("value", "shade"), [(None, 0), (0.0, 0), (0.05, 0), (0.5, 2), (1.0, 5), (9.0, 5), (-0.7, -4), (-9.0, -5)]
)
def test_shades_grow_with_the_value_and_end_at_the_limit(value, shade):
    assert level(value, 1.0) == shade and abs(shade) <= LEVELS


def test_tokens_carry_shade_words_and_the_planted_error():
    heat = heatmap([row([0.0, 2.0, -2.0, None], planted=[False, False, True, False])])
    tokens = heat.rows[0].responses[0].tokens
    assert [t.classes for t in tokens] == ["", "a5", "a-5 planted", ""]
    assert tokens[2].label == "token 3: t2\nr  −2\nplanted error"
    assert tokens[3].label.endswith("r  –")
    assert heat.planted and heat.rows[0].responses[0].table.rows[2] == ["3", " t2", "−2", "yes"]


def test_one_huge_token_does_not_bleach_the_others():
    heat = heatmap([row([1.0] * 99 + [1000.0])])
    assert heat.limits == [1.0]
    assert {t.classes for t in heat.rows[0].responses[0].tokens} == {"a5"}


def test_a_page_holds_so_many_rows_and_tokens_and_says_what_is_missing():
    heat = heatmap([row([1.0] * 3)] * 25)
    assert (len(heat.rows), heat.left_out) == (MOST_ROWS, 5)
    heat = heatmap([row([1.0] * 2000)] * 3)
    shown = [len(r.responses[0].tokens) for r in heat.rows]
    assert sum(shown) == MOST_TOKENS and heat.left_out == 1
    assert heat.rows[-1].responses[0].cut == 2000 - shown[-1]
    assert heatmap([]) is None
