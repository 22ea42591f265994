"""The Markdown report, rendered with GitHub's extensions."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from regression import synthetic

from fastdiff.regression.reports import words
from fastdiff.regression.reports.markdown import MARKER, markdown

LIMIT = 65_536


class Reader(HTMLParser):
    """Collects the cells of each table as plain text, all tags, and all links."""

    def __init__(self):
        super().__init__()
        self.tables, self.tags, self.links = [], [], []
        self.in_cell = False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.tags.append("/" + tag)
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        if self.in_cell:
            self.tables[-1][-1][-1] += data


def rendered(text):
    reader = Reader()
    reader.feed(
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)
    )
    return reader


def test_tables_of_changed_rows_equal_rows_and_environment():
    comparison = synthetic.comparison()
    text = markdown(comparison)
    assert text.splitlines()[0] == MARKER == "<!-- fastdiff-report -->"
    assert "### ❌ 3 of 16 rows got slower · 2 faster" in text
    changed, same, environment = rendered(text).tables
    assert changed[0] == ["", "name", "base", "new", "ratio [interval]", "n"]
    assert [row[1] for row in changed[1:-1]] == [
        line.name for line in comparison.lines if line.verdict != "same"
    ]
    assert changed[1] == [
        "❌ slower",
        "demo, float32 · fastdiff · step",
        "5.141 ms",
        "6.691 ms",
        "1.301 [1.286, 1.317]",
        "4×15",
    ]
    assert changed[-1][1:5] == ["geometric mean of the times", "", "", "1.008 [0.994, 1.021]"]
    assert len(same) == 1 + comparison.count("same")
    assert ["torch ⚠️", "2.13.0+cpu", "2.13.1+cpu"] in environment


def test_hostile_names_stay_plain_text():
    comparison = synthetic.hostile()
    text = markdown(comparison)
    reader = rendered(text)
    changed, same, _ = reader.tables
    assert [row[1] for row in changed[1:-1]] == [
        words.plain(line.name) for line in comparison.lines if line.verdict != "same"
    ]
    assert [row[1] for row in same[1:]] == [words.plain(name) for name in synthetic.HOSTILE]
    assert {len(row) for row in changed + same} == {6}
    opened = {tag for tag in reader.tags if not tag.startswith("/")}
    assert opened <= {
        *("h3", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "strong"),
        *("ul", "li", "details", "summary"),
    }
    assert not reader.links
    for markup in ("@user", "#1 ", "www.", "https://", "<script", "$x"):
        assert markup not in text


@pytest.mark.parametrize("verdict", ["slower", "same", "inconclusive"])
@pytest.mark.parametrize("name", ["row", "`|" * 200, "🚀" * 200])
def test_the_report_fits_into_a_github_comment(verdict, name):
    line = replace(synthetic.count(name, 3, 3), verdict=verdict, note=name)
    state = replace(
        synthetic.BASE, name=name * 9, versions={f"{name}{i}": name for i in range(500)}
    )
    comparison = synthetic.comparison(
        lines=(line,) * 3000, differences=(name,) * 3000, base=state, command=name * 9
    )
    text = markdown(comparison, whole="all.json has all")
    assert len(text) < LIMIT
    reader = rendered(text)
    rows = [row[1] for table in reader.tables[:-1] for row in table]  # the last: environment
    shown = rows.count(words.plain(name))
    assert 20 < shown < 3000
    assert [row for row in rows if "more" in row] == [f"and {3000 - shown} more; all.json has all"]
    assert reader.tags[-1] == "/details"


def test_a_comparison_of_nothing_says_so():
    text = markdown(synthetic.comparison(lines=(), geomean=None))
    assert "### ❔ Nothing was compared" in text
