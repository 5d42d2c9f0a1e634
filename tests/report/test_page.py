from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from pipeline.errors import UserError
from pipeline.report import Trial, write_evaluation_report, write_sweep_report
from pipeline.report.definitions import definition, look_up
from pipeline.report.evaluation import HEADLINE
from pipeline.report.falling import FALLING
from pipeline.report.page import printable
from tests.report.examples import ATTACK, evaluation, run, trials


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, and the text outside of script and style."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self._raw = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self._raw = ""

    def handle_data(self, data):
        if not self._raw:
            self.pieces.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("report")
    own = write_evaluation_report(evaluation(), run(folder), folder / "new" / "eval.html")
    swept = write_sweep_report(ATTACK, trials(), folder / "sweep.html", metric="samples/reward")
    return {"eval": own.read_text(), "sweep": swept.read_text()}


@pytest.mark.parametrize("name", ["eval", "sweep"])
def test_hostile_text_is_shown_as_text(pages, name):
    page = Page(pages[name])
    assert (page.count("script"), page.count("style"), page.count("img")) == (1, 1, 0)
    handlers = [a for _, attributes in page.elements for a in attributes if a.startswith("on") or a == "style"]
    assert handlers == []
    assert sum(ATTACK in piece for piece in page.pieces) >= 10
    assert "49" not in "".join(re.findall(r"onerror.{0,60}", pages[name]))  # nor was it taken for a template
    labels = [attributes["aria-label"] for _, attributes in page.elements if "aria-label" in attributes]
    assert sum(ATTACK in label for label in labels) >= 4
    assert all(ATTACK in label for label in labels if "script" in label)


@pytest.mark.parametrize("name", ["eval", "sweep"])
def test_a_page_needs_nothing_from_outside(pages, name):
    page = Page(pages[name])
    outside = [
        v
        for _, attributes in page.elements
        for a, v in attributes.items()
        if a in ("src", "href") and not v.startswith("#")
    ]
    assert outside == []
    assert page.count("link") == 0 and "@import" not in pages[name] and "url(" not in pages[name]
    assert "default-src 'none'" in next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)


@pytest.mark.parametrize("name", ["eval", "sweep"])
def test_what_links_and_labels_point_at_is_there_once(pages, name):
    page = Page(pages[name])
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for t, a in page.elements if t == "a"} <= set(ids)


def test_every_plot_has_words_for_its_marks_and_a_table(pages):
    for source in pages.values():
        page = Page(source)
        figures = page.count("figure")
        assert figures >= 3
        assert page.count("details") >= figures and page.count("table") > figures
        marks = [a for t, a in page.elements if a.get("class", "").startswith(("mark", "t "))]
        assert marks and all(a["tabindex"] == "0" and a["role"] == "img" and a["aria-label"] for a in marks)


def test_numbers_and_intervals_reach_the_page(pages):
    text = " ".join(" ".join(Page(pages["eval"]).pieces).split())
    assert "Preference accuracy 0.75 95 % 0.6 … 0.86" in text
    assert "Mean reward 0.5 95 % 0.304 … 0.696 own samples, under the scorer; reference 0.25; n = 20" in text
    assert "entropy 2.5 (2.3 … 2.7) 3 (2.8 … 3.2)" in text
    swept = " ".join(" ".join(Page(pages["sweep"]).pieces).split())
    assert "Trials 5 4 finished, 1 failed" in swept
    assert "Best samples/reward 0.6 95 % 0.502 … 0.698" in swept


def test_the_falling_reward_is_explained_where_it_falls(pages, tmp_path):
    assert FALLING in "".join(Page(pages["eval"]).pieces)
    page = write_evaluation_report(evaluation(), None, tmp_path / "none.html").read_text()
    assert FALLING not in "".join(Page(page).pieces)


def test_the_same_input_gives_the_same_bytes(pages, tmp_path):
    again = write_evaluation_report(evaluation(), run(tmp_path), tmp_path / "again.html")
    assert again.read_text() == pages["eval"]


def test_characters_that_nobody_sees_are_spelled_out(tmp_path):
    text = "a\x00b\x1b[31m\ud800\u202eevil\n\t漢👩‍🚀"
    assert printable(text) == "a⟨U+0000⟩b⟨U+001B⟩[31m⟨U+D800⟩⟨U+202E⟩evil\n\t漢👩‍🚀"
    page = write_sweep_report("t", [Trial(label=text, objective="o", parameters={})], tmp_path / "p.html").read_text()
    assert printable(text) in "".join(Page(page).pieces)


def test_trials_are_ranked_with_those_without_a_number_last(tmp_path):
    values = {"low": 1.0, "none": None, "nan": float("nan"), "high": 3.0}
    found = [
        Trial(label=name, objective="o", parameters={}, metrics={} if value is None else {"m": value})
        for name, value in values.items()
    ]
    for mode, order in (("max", ["high", "low", "none", "nan"]), ("min", ["low", "high", "none", "nan"])):
        pieces = Page(write_sweep_report("t", found, tmp_path / "p.html", "m", mode).read_text()).pieces
        assert [p for p in pieces[pieces.index("All trials, best first") :] if p in values][:4] == order


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^[^\n]*cannot be written[^\n]*$"):
        write_sweep_report("t", [], tmp_path / "file" / "page.html")


def test_an_empty_evaluation_and_an_empty_sweep_are_pages_too(tmp_path):
    from pipeline.evaluation.results import Evaluation

    page = Page(write_evaluation_report(Evaluation(title="t", metrics={}), tmp_path, tmp_path / "e.html").read_text())
    assert page.count("figure") == 0 and page.count("h1") == 1
    assert Page(write_sweep_report("t", [], tmp_path / "s.html").read_text()).count("h1") == 1


def test_every_headline_metric_is_defined_where_it_is_measured():
    assert [name for name in HEADLINE if not definition(name)] == []


def test_placeholders_of_definitions_fit_names():
    definitions = {"a": "exact", "<who>/distinct_<n>": "distinct", "x.y": "dot"}
    assert [look_up(definitions, n) for n in ("a", "s/distinct_2", "x.y", "xzy", "s/b")] == [
        "exact",
        "distinct",
        "dot",
        "",
        "",
    ]


def test_a_full_heatmap_stays_below_a_megabyte(tmp_path):
    from pipeline.evaluation.results import CreditResponse, CreditRow, Evaluation

    values = {name: [0.123456 * i for i in range(300)] for name in ("implicit reward", "advantage", "V", "-log π_ref")}
    response = CreditResponse(label="chosen", tokens=[" understanding"] * 300, values=values)
    rows = [CreditRow(row_id=i, prompt="p" * 400, responses=[response, response]) for i in range(20)]
    page = write_evaluation_report(Evaluation(title="t", metrics={}, credit=rows), None, tmp_path / "p.html")
    assert 500_000 < page.stat().st_size < 1_000_000
