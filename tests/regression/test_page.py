"""The HTML page as text; test_browser.py opens it in a browser."""

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from regression import synthetic

from fastdiff.errors import UserError
from fastdiff.regression import history, reports
from fastdiff.regression.reports import plots, words
from fastdiff.regression.reports.page import history_page, page

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data.strip())


@pytest.fixture(scope="module")
def whole():
    """The page with a comparison, a history and a roofline."""
    return page(synthetic.comparison(), history.read(RESULTS), [synthetic.ROOFLINE])


def test_the_page_holds_all_rows_and_facts(whole):
    comparison = synthetic.comparison()
    reader = Reader(whole)
    for line in comparison.lines:
        assert line.name in reader.text
    for fact in ("3 of 16 rows got slower", "1.301 [1.286, 1.317]", "8,600,123,456 bytes"):
        assert fact in reader.text
    for fact in ("History: demo, float32", "Roofline: NVIDIA H100", "2.13.1+cpu", "60%"):
        assert any(fact in part for part in reader.text)
    assert reader.tags.count("figure") == 12
    assert whole == page(comparison, history.read(RESULTS), [synthetic.ROOFLINE])


def test_the_page_loads_nothing_and_runs_no_script(whole):
    reader = Reader(whole)
    assert not {"script", "img", "iframe", "object", "embed", "audio", "video"} & set(reader.tags)
    links = [value for name, value in reader.attributes if name in ("href", "src", "xlink:href")]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in whole
    assert not re.search(r"url\((?!#)", whole)
    assert "default-src 'none'" in whole


def test_ids_are_unique_and_no_placeholder_is_left(whole):
    ids = [value for name, value in Reader(whole).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]\b", whole)
    assert "DejaVu" not in whole


def test_hostile_names_stay_plain_text():
    points = [
        history.Point(name, f"{name} · {name}", name, name, 2.0, 1.9, 2.1)
        for name in synthetic.HOSTILE
    ]
    roof = replace(
        synthetic.ROOFLINE,
        gpu=synthetic.HOSTILE[0],
        points=tuple(replace(synthetic.ROOFLINE.points[0], name=n) for n in synthetic.HOSTILE),
    )
    text = page(synthetic.hostile(), points, [roof])
    text.encode("utf-8")
    reader = Reader(text)
    assert not {"script", "img", "a"} & set(reader.tags)
    for name in synthetic.HOSTILE:
        assert words.plain(name) in reader.text
    assert "fill: #010101" in Reader(page(named("fill: #010101"))).text
    assert "$x^2$" in Reader(page(named("$x^2$"))).text


def named(name):
    return synthetic.comparison(synthetic.time(name, 1.2, 0))


@pytest.mark.parametrize(
    "lines",
    [
        (),
        (synthetic.count("only one", None, 3),),
        (synthetic.count("gone", 3, 0), synthetic.count("new", 0, 3)),
        (synthetic.time("tiny", 1.0, 0, 1e-7), synthetic.time("huge", 1.0, 0, 1e9)),
        (synthetic.time("one", 1.0, 0, processes=1, rounds=1),),
        (replace(synthetic.time("far", 1.0, 0), ratio=900.0, lo=0.0, hi=1e9),),
        tuple(synthetic.time(f"{i}", 1.2, i) for i in range(60)),
    ],
    ids=["none", "one state", "zero", "scales", "one sample", "far", "many"],
)
def test_extreme_comparisons_are_drawn(lines):
    text = page(synthetic.comparison(lines=lines, geomean=None))
    for line in lines:
        assert line.name in Reader(text).text


def test_the_history_page_holds_its_facts():
    text = history_page(history.read(RESULTS))
    assert "× eager in the same run" in text
    assert "on cpu-zen5-2core" in text
    assert "Nothing was measured yet" in history_page([])


def test_labels_keep_a_minimum_distance():
    placed = plots.spread([1.0, 3.0, 1.02, 1.01], 0.2)
    assert all(b - a >= 0.2 - 1e-9 for a, b in pairwise(sorted(placed)))
    assert placed[1] == 3.0


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(package, monkeypatch):
    monkeypatch.delattr(reports, "plots")  # so that it is imported again
    monkeypatch.delitem(sys.modules, plots.__name__)
    imported = [name for name in sys.modules if name.startswith(f"{package}.")]
    for module in (package, *imported):
        monkeypatch.setitem(sys.modules, module, None)
    how = r"; pip install 'fastdiff-engine\[report\]'$"
    with pytest.raises(UserError, match=f"{package}.*{how}"):
        page(synthetic.comparison())
