"""The documentation site: it builds strictly, its numbers equal the committed ones, its code runs,
and a real browser shows it from a folder, light and dark, at desktop and phone width.

The tests leave screenshots in build/.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import environment

import fastdiff
from fastdiff.kernels.dispatch import all_kernels
from tools import site_build, site_kernels, site_measured

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ADDED = re.compile(r"`(fastdiff/kernels/limited/\w+\.py)`.*?```python\n(.*?)```", re.S)
LOOKED_AT = ("index", "design", "pipelines", "measured/h200", "kernels/attention")
DRAWN = ("design", "measured/h200")
INKS = """[...document.querySelectorAll("figure text")].map(text => getComputedStyle(text).fill)"""
INK = {"light": "rgb(28, 30, 33)", "dark": "rgb(232, 234, 237)"}
"""Text colours of drawings and figures, which are the page's."""
PATIENCE = 180_000
"""Milliseconds per page; long, because other processes may occupy the cores."""


def blocks(language, page):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.S)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with docs/ and site/, built without a fault."""
    out = tmp_path_factory.mktemp("built")
    assert site_build.build(out) == []
    return out


@pytest.fixture
def page(built):
    """page(name): the page's source as zensical reads it."""
    return lambda name: (built / "docs/pages" / name).read_text()


def test_generated_pages_are_reproducible(built, page):
    static = json.loads(site_kernels.STATIC.read_text())
    again = {
        "kernels/attention.md": site_kernels.page(all_kernels()["attention"], static),
        "measured/roofline.md": site_measured.page(site_measured.RESULTS / "roofline"),
    }
    for name, text in again.items():
        assert page(name) == site_build.prepared(text, Path(name), built / "docs/pages")


def test_a_kernels_page_holds_its_contract(page):
    rows = json.loads((ROOT / "benchmarks/static/kernels.json").read_text())["rows"]
    kernels = all_kernels()
    assert len(kernels) > 10
    for name, kernel in kernels.items():
        text = page(f"kernels/{name}.md")
        compiled = [row for row in rows if row["op"] == name]
        assert text.count(" | float16 | ") + text.count(" | bfloat16 | ") + text.count(
            " | float32 | "
        ) == len(compiled)
        for row in compiled:
            assert f"`{row['kernel']}`, {row['case']} | {row['dtype']} | {row['arch']} |" in text
        for case in kernel.spec.cases:
            assert f"| {case.name} | " in text
        assert site_kernels.source(kernel.spec).count("def ") >= 1


def test_links_to_files_become_pages_and_links_to_folders_plain_text(tmp_path):
    text = "[a](../.github/workflows/docs.yml#x), [b](../tests), [c](faq.md), `[d](../tests)`"
    made = site_build.prepared(text, Path("page.md"), tmp_path)
    assert made.startswith("[a](files/github/workflows/docs.yml.md#x), b, [c](faq.md)")
    page = (tmp_path / "files/github/workflows/docs.yml.md").read_text()
    assert "# `.github/workflows/docs.yml`" in page
    assert (ROOT / ".github/workflows/docs.yml").read_text().strip() in page


def test_amounts_have_units():
    texts = [site_kernels.amount(number) for number in (0, 7, 999, 1000, 83_321_903, 1.5588e12)]
    assert texts == ["0", "7", "999", "1 k", "83.3 M", "1.56 T"]


def test_the_drawn_launches_equal_the_committed_counts():
    drawing = (DOCS / "drawings/launches.svg").read_text()
    rows = json.loads((ROOT / "benchmarks/static/sd15.json").read_text())["rows"]
    counts = {row["backend"]: row["counts"] for row in rows}
    kinds = {*counts["eager"]["step"], *counts["fastdiff"]["step"]}
    drawn = dict(re.findall(r'<g id="launches-([\w-]+)">(.*?)</g>', drawing))
    assert drawn.keys() == {kind.replace(" ", "-") for kind in kinds} | {"total"}
    for kind in kinds:
        wanted = [
            counts[who]["step"].get(kind, {"launches": 0})["launches"]
            for who in ("eager", "fastdiff")
        ]
        group = drawn[kind.replace(" ", "-")]
        assert [int(number) for number in re.findall(r">(\d+)<", group)] == wanted
        widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="9"', group)]
        assert widths == [pytest.approx(220 / 309 * number, abs=0.06) for number in wanted]
    totals = [str(counts[who]["step_total"]["launches"]) for who in ("eager", "fastdiff")]
    assert re.findall(r">(\d+)<", drawn["total"]) == totals


def test_each_committed_result_has_a_figure_and_unknown_schemas_are_refused(built, page, tmp_path):
    results = sorted((ROOT / "benchmarks/results").rglob("*.json"))
    assert len(results) > 15
    for path in results:
        text = page(f"measured/{path.relative_to(site_measured.RESULTS).parts[0]}.md")
        assert f"files/{path.relative_to(ROOT)}" in text
        assert text.count("<svg") >= 2 or path.parent.name == "mutants"  # a table alone
    (tmp_path / "news.json").write_text('{"schema": "fastdiff.news/1"}')
    with pytest.raises(ValueError, match=r"no figure is known for 'fastdiff.news/1'"):
        site_measured.figure(tmp_path / "news.json")


def test_a_measured_table_equals_its_file():
    path = ROOT / "benchmarks/results/h200/first-contact/sd15.json"
    lines = [x for x in site_measured.figure(path).splitlines() if x.startswith("| ")][2:]
    rows = json.loads(path.read_text())["rows"]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        ratio = row["ratio_vs_eager"]
        backend, speed, times, *_ = [cell.strip() for cell in line.strip("|").split("|")]
        assert backend == row["backend"]
        assert float(speed) == pytest.approx(row["steps_per_s"], rel=1e-3)
        assert times == f"{ratio['median']:.2f} [{ratio['lo']:.2f}, {ratio['hi']:.2f}]"


def test_files_that_pages_name_exist():
    for page in ("design.md", "add-a-kernel.md"):
        text = (DOCS / page).read_text()
        here = ""
        for name in re.findall(r"`([\w/]+\.py)`", text):
            if "limited" in name or name in ("spec.py", "cpu.py", "gpu.py", "__init__.py"):
                continue
            folder, _, _ = name.rpartition("/")
            here = folder or here  # "models/a.py, b.py": b is beside a
            places = (ROOT / "fastdiff" / name, ROOT / "fastdiff" / here / name, ROOT / name)
            assert any(place.exists() for place in places), f"{page}: {name}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('<a href="gone.html">', "a.html links to gone.html, which is not there"),
        ('<a href="index.html#gone">', "a.html links to index.html#gone, which has no such place"),
        ('<script src="https://cdn.example/x.js">', "a.html loads https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="https://cdn.example/x.css">', "a.html loads https://cdn"),
        ('<img src="gone.png">', "a.html links to gone.png, which is not there"),
        ('<a href="https://example.org">', None),
        ('<a href="index.html#here">', None),
    ],
)
def test_faults_of_a_page_are_named(tmp_path, text, fault):
    (tmp_path / "index.html").write_text('<p id="here"><a href="a.html">')
    (tmp_path / "a.html").write_text(text)
    found = list(site_build.checked(tmp_path))
    assert len(found) == (fault is not None)
    assert fault is None or found[0].startswith(fault)


def test_an_unlinked_page_and_a_foreign_stylesheet_are_named(tmp_path):
    (tmp_path / "index.html").write_text("")
    (tmp_path / "alone.html").write_text('<a href="alone.html">')
    (tmp_path / "a.css").write_text("@import url(https://fonts.example/a.css);")
    assert [*site_build.checked(tmp_path)] == [
        "alone.html is linked from nowhere",
        "a.css loads https://fonts.example/a.css; the site must bring it along",
    ]


def test_zensical_refuses_a_link_to_nothing(tmp_path, monkeypatch):
    for part in ("docs", "tools"):
        (tmp_path / part).mkdir()
    (tmp_path / "docs/index.md").write_text("# A\n\n[b](b.md)\n")
    (tmp_path / "mkdocs.yml").write_text(
        "site_name: a\nplugins: [search, {mkdocstrings: {handlers: {python: {}}}}]\n"
        "nav: [{A: index.md}]\n"
    )
    monkeypatch.setattr(site_build, "ROOT", tmp_path)
    monkeypatch.setattr(site_build, "DOCS", tmp_path / "docs")
    for module in (site_build.site_kernels, site_build.site_measured):
        monkeypatch.setattr(module, "pages", dict)
    (fault,) = site_build.build(tmp_path / "out")
    assert "page does not exist" in fault


def test_the_pages_python_runs():
    for page in ("index.md", "faq.md", "textbook.md", "batching.md"):
        names = {}
        for block in blocks("python", page):
            exec(compile(block, page, "exec"), names)  # in order, as a reader runs them
        assert names["pipe"].unet is not None


def test_the_first_pages_commands_are_those_of_the_readme():
    install, generate, bench = "".join(blocks("sh", "index.md")).splitlines()
    assert f"\n{install}\n" in (DOCS / "install.md").read_text()
    readme = "".join(re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    for line in (generate, bench):
        assert f"\n{line} " in readme  # there with more options


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """A copy of fastdiff and its tests, plus the kernel that docs/add-a-kernel.md adds."""
    folder = tmp_path_factory.mktemp("added")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(fastdiff.__file__).parent, folder / "fastdiff", ignore=ignored)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    files = ADDED.findall((DOCS / "add-a-kernel.md").read_text())
    assert [Path(name).name for name, _ in files] == ["spec.py", "cpu.py", "gpu.py", "__init__.py"]
    for name, text in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


PROOF = """
import sys, torch
from fastdiff.kernels.contract import verify
from fastdiff.kernels.dispatch import all_kernels
kernel = all_kernels()["limited"]
for case in kernel.spec.cases:
    for dtype in kernel.spec.dtypes:
        for verdict in verify(kernel.spec, kernel.implementations["cpu"](), case, dtype):
            assert verdict.passed, (case, dtype, verdict)
    inputs = kernel.spec.inputs(case, torch.float32, torch.device("cpu"), torch.Generator())
    assert set(torch.library.opcheck(kernel.op, (), inputs).values()) == {"SUCCESS"}
import pytest
chosen = "limited and not ada_norm and not residual"  # other kernels' cases of that name
options = ["-q", "-p", "no:cacheprovider", "-k", chosen]
sys.exit(pytest.main([*options, "tests/kernels/test_triton.py"]))
"""


# runs the kernels' tests in a copy of the project
@pytest.mark.product
def test_the_pages_kernel_passes_the_tests_of_all_kernels(added):
    paths = [str(added), *(path for path in sys.path if path.endswith("-packages"))]
    # -S skips site, so that an editable install does not come before the copy
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROOF],
        cwd=added,
        env=environment() | {"PYTHONPATH": ":".join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 4, done.stdout


@pytest.fixture
def opened(browser, built):
    """tab_of(scheme, width), and go(tab, page): the page may log nothing and ask no other host."""
    contexts, noise = [], []
    home = (built / "site").as_uri()

    def tab_of(scheme, width):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        tab = context.new_page()
        tab.on("console", lambda message: noise.append(message.text))
        tab.on("pageerror", lambda error: noise.append(str(error)))
        own = (home, "data:", "blob:", "about:")
        tab.on("request", lambda request: request.url.startswith(own) or noise.append(request.url))
        return tab

    def go(tab, name):
        tab.goto(f"{home}/{name}.html", wait_until="load")
        assert noise == [], name

    yield tab_of, go
    for context in contexts:
        context.close()


def background(tab):
    return tab.evaluate("getComputedStyle(document.body).backgroundColor")


def largest_of_each_kind(pages):
    """Each page of docs/, and of the generated pages the largest of each folder."""
    found = {}
    for page in sorted(pages, key=lambda page: page.stat().st_size):
        written = page.parent.name == "site" and (DOCS / f"{page.stem}.md").exists()
        found[page if written else page.parent] = page
    return found.values()


# a browser opens each page
@pytest.mark.product
@pytest.mark.browser
@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(largest_of_each_kind, id="largest of each kind"),
        pytest.param(list, id="all"),
    ],
)
def test_each_page_fits_a_phone(opened, built, chosen):
    tab_of, go = opened
    tab = tab_of("dark", 390)
    pages = {path.relative_to(built / "site") for path in chosen((built / "site").rglob("*.html"))}
    for name in sorted(page.with_suffix("").as_posix() for page in pages):
        go(tab, name)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390, name


# 8 s
@pytest.mark.product
@pytest.mark.browser
@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 390)], ids=["light", "dark"]
)
def test_screenshots_in_both_schemes(opened, scheme, width):
    tab_of, go = opened
    tab = tab_of(scheme, width)
    folder = ROOT / "build/screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    for name in LOOKED_AT:
        go(tab, name)
        light = sum(map(int, re.findall(r"\d+", background(tab))[:3])) > 3 * 128
        assert light == (scheme == "light"), name
        inks = tab.evaluate(INKS)
        assert (INK[scheme] in inks) == (name in DRAWN), name
        assert "rgb(0, 0, 0)" not in inks, name
        tab.screenshot(
            path=folder / f"{name.replace('/', '-')}-{scheme}-{width}.png", full_page=True
        )


@pytest.mark.browser
def test_search_works_from_a_folder(opened):
    tab_of, go = opened
    tab = tab_of("light", 1280)
    go(tab, "faq")
    tab.keyboard.press("/")
    tab.keyboard.type("offload")
    found = tab.get_by_role("link").filter(has_text="CPU offload?").first
    found.wait_for()
