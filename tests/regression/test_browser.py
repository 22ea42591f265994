"""The HTML report in a real browser: no request, no clipped text, contrast in light and dark.

The tests leave screenshots in build/.
"""

from pathlib import Path

import pytest
from covered import covered
from regression import synthetic

from fastdiff.regression import history
from fastdiff.regression.reports.page import history_page, page

ROOT = Path(__file__).parents[2]
CONTRAST = 4.5  # WCAG 2.2, 1.4.3, level AA

# Contrast of each text in HTML and SVG against the nearest background that is not transparent.
CONTRASTS = """() => {
  const rgb = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => rgb(color).slice(0, 3)
    .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const solid = color => { const parts = rgb(color); return parts.length < 4 || parts[3] > 0; };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const color = node instanceof SVGElement ? style.fill : style.color;
    let ground = node;
    while (ground !== document.body && !solid(getComputedStyle(ground).backgroundColor))
      ground = ground.parentElement;
    const [a, b] = [light(color), light(getComputedStyle(ground).backgroundColor)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([contrast, node.textContent.trim().slice(0, 60), node instanceof SVGElement]);
  }
  return found;
}"""
# CUT: texts whose box leaves the viewport on a side; OVERLAPS: texts over others of their figure.
CUT = """() => [...document.querySelectorAll("svg text, h1, h2, p, td, th, dt, dd, figcaption, li")]
  .filter(node => node.getClientRects().length)
  .filter(node => { const box = node.getBoundingClientRect();
                    return box.left < -0.5 || box.right > innerWidth + 0.5; })
  .map(node => node.textContent.trim())"""
OVERLAPS = """() => [...document.querySelectorAll("svg")].flatMap(svg => {
  const texts = [...svg.querySelectorAll("text")].filter(node => node.getClientRects().length);
  const boxes = texts.map(node => node.getBoundingClientRect());
  return texts.flatMap((node, i) => texts.slice(i + 1).filter((_, j) => {
    const [a, b] = [boxes[i], boxes[i + 1 + j]];
    return Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
  }).map(other => node.textContent + " / " + other.textContent));
})"""
SMALLEST = """() => Math.min(...[...document.querySelectorAll("svg text")]
  .filter(node => node.getClientRects().length)
  .map(node => parseFloat(getComputedStyle(node).fontSize) * node.getScreenCTM().a))"""
# Strokes and fills of the figures; a wrong CSS variable would make them black in both schemes.
DRAWN = """() => [...new Set([...document.querySelectorAll("svg path, svg use")]
  .map(node => getComputedStyle(node)).flatMap(style => [style.fill, style.stroke]))]"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files of four pages by name: a full report, hostile text, a history, an empty report."""
    points = history.read(ROOT / "benchmarks" / "results") + synthetic.history()
    texts = {
        "report": page(synthetic.comparison(), points, [synthetic.ROOFLINE]),
        "hostile": page(synthetic.hostile(), [], []),
        "history": history_page(points),
        "nothing": page(synthetic.comparison(lines=(), geomean=None)),
    }
    folder = tmp_path_factory.mktemp("pages")
    files = {name: folder / f"{name}.html" for name in texts}
    for name, file in files.items():
        file.write_text(texts[name], encoding="utf-8")
    return files


@pytest.fixture
def opened(browser, pages):
    """opened(name, scheme, width): the loaded page; it made no request and logged nothing."""
    contexts, noise = [], []

    def open_page(name, scheme, width):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: noise.append(message.text))
        tab.on("pageerror", lambda error: noise.append(str(error)))
        tab.on("dialog", lambda dialog: noise.append(dialog.message))
        address = pages[name].as_uri()
        own = ("data:", address)
        tab.on("request", lambda request: request.url.startswith(own) or noise.append(request.url))
        tab.goto(address)
        assert noise == []
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert noise == []  # nor later


@pytest.mark.browser
@pytest.mark.parametrize(
    ("name", "scheme", "width"),
    covered(
        ["report", "hostile", "history", "nothing"],
        ["light", "dark"],
        [1280, 981, 761, 420, 320],
        together=1,
    ),
)
def test_pages_are_readable(opened, name, scheme, width):
    tab = opened(name, scheme, width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(CUT) == []
    assert tab.evaluate(OVERLAPS) == []
    texts = tab.evaluate(CONTRASTS)
    assert len(texts) > 10
    assert [text for text in texts if text[0] < CONTRAST] == []
    if name != "nothing":
        assert any(text[2] for text in texts)
        assert tab.evaluate(SMALLEST) >= 9


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_use_the_pages_colours(opened, scheme):
    tab = opened("report", scheme, 1280)
    ground, ink = ("rgb(252, 252, 250)", "rgb(28, 30, 33)")
    if scheme == "dark":
        ground, ink = ("rgb(19, 21, 24)", "rgb(232, 234, 237)")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    drawn = tab.evaluate(DRAWN)
    assert ink in drawn
    assert len(drawn) > 8
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    tab.screenshot(path=folder / f"report-{scheme}.png", full_page=True)
