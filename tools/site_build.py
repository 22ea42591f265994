"""The documentation site: `python -m tools.site_build` builds it into build/site, or exits 1.

The pages are those of docs/ and those generated from the tree: kernels, commands, measurements.
They are collected in build/docs, zensical turns them into HTML, and all links are checked. Every
fault is printed on a line: a link to nothing, a page that is in no menu, a drawing, script or font
that the site does not contain.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from tools import site_commands, site_kernels, site_measured

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OUT = ROOT / "build"
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
DRAWING = re.compile(r"^!\[([^\]]+)\]\((drawings/[\w-]+\.svg)\)$", re.M)
FENCE = re.compile(r"^(`{3,}).*?^\1$", re.M | re.S)
LEXERS = {".py": "python", ".md": "markdown", ".txt": "text", ".yml": "yaml"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="where docs/ and site/ are made")
    faults = build(parser.parse_args().out)
    for fault in faults:
        print(f"site: {fault}", file=sys.stderr)
    sys.exit(1 if faults else 0)


def build(out: Path) -> list[str]:
    """Make out/docs and out/site; return what is wrong with them, one sentence for each fault."""
    work, site = out / "docs", out / "site"
    for old in (work, site):
        shutil.rmtree(old, ignore_errors=True)
    assemble(work)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    command += ["--config-file", str(work / "mkdocs.yml")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    if done.returncode:
        return [f"zensical exits {done.returncode}:\n{said}"]
    print(said)
    (work / "site").rename(site)
    for extra in ("404.html", "sitemap.xml"):  # of a server: their links begin at its root
        (site / extra).unlink(missing_ok=True)
    return [*checked(site)]


def assemble(work: Path) -> None:
    """The site's source in `work`: mkdocs.yml and pages/, including all generated pages."""
    pages = work / "pages"
    shutil.copytree(DOCS, pages)
    generated = {
        **site_kernels.pages(),
        **site_measured.pages(),
        "commands.md": site_commands.page(),
    }
    for name, text in generated.items():
        write(pages / name, text)
    for path in sorted(pages.rglob("*.md")):
        write(path, prepared(path.read_text("utf-8"), path.relative_to(pages), pages))
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    config["nav"] = menu(config["nav"], list(generated))
    config |= {"docs_dir": "pages", "site_dir": "site"}
    python = config["plugins"][-1]["mkdocstrings"]["handlers"]["python"]
    python["paths"] = [str(ROOT)]
    write(work / "mkdocs.yml", yaml.safe_dump(config, sort_keys=False))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def menu(entries: Any, generated: list[str]) -> Any:
    """The menu of mkdocs.yml; the entry "folder/" becomes the folder's generated pages."""
    if isinstance(entries, str) and entries.endswith("/"):
        return [name for name in generated if name.startswith(entries)]
    if isinstance(entries, list):
        return [menu(entry, generated) for entry in entries]
    if isinstance(entries, dict):
        return {title: menu(entry, generated) for title, entry in entries.items()}
    return entries


def prepared(text: str, page: Path, pages: Path) -> str:
    """A page as the site needs it: drawings are inlined with the page's colours, and files of the
    repository that it links to become pages."""

    def linked(found: re.Match[str]) -> str:
        label, link = found.groups()
        path, hash_, anchor = link.partition("#")
        if not path or urlsplit(link).scheme:
            return found[0]
        source = (DOCS / page.parent / path).resolve()
        if not source.is_relative_to(DOCS) and source.is_dir():
            return label[1:-1]  # a folder of the repository, which is not a page
        if source.is_relative_to(DOCS) or not source.is_file():
            return found[0]  # a page; if there is none, zensical reports it
        name = shown(source, pages)
        up = "../" * len(page.parent.parts)
        return f"{label}({up}{name}{hash_}{anchor})"

    pieces, at = [], 0
    for fence in FENCE.finditer(text):
        pieces += [LINK.sub(linked, text[at : fence.start()]), fence[0]]
        at = fence.end()
    text = "".join([*pieces, LINK.sub(linked, text[at:])])
    return DRAWING.sub(lambda found: inline(pages / found[2], found[1]), text)


def shown(source: Path, pages: Path) -> str:
    """Write a file of the repository as a page, return its name. Pictures and data stay files."""
    relative = source.relative_to(ROOT)
    name = "/".join(["files", *(part.lstrip(".") for part in relative.parts)])  # hidden ones too
    if source.suffix not in LEXERS:
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, pages / name)
        return name
    text = source.read_text("utf-8")
    fence = "`" * (1 + max(map(len, ["``", *re.findall("`+", text)])))
    body = f"# `{relative}`\n\n{fence}{LEXERS[source.suffix]}\n{text.rstrip()}\n{fence}\n"
    write(pages / f"{name}.md", f"---\nsearch:\n  exclude: true\n---\n\n{body}")
    return f"{name}.md"


def inline(drawing: Path, title: str) -> str:
    """An SVG file without its colours, which the site's style sheet gives it in both schemes."""
    svg = re.sub(r"<\?xml.*?\?>|<!--.*?-->|<style>.*?</style>", "", drawing.read_text(), flags=re.S)
    svg = "".join(line.strip() + "\n" for line in svg.splitlines() if line.strip())
    label = f'role="img" aria-label="{title}"'
    return f'<figure class="drawing">{svg.replace("<svg", f"<svg {label}", 1).strip()}</figure>'


class Page(HTMLParser):
    """A page's links, the files that it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.loads.append(given["href"])
        elif "src" in given:
            self.loads.append(given["src"])


def checked(site: Path) -> Iterator[str]:
    """What is wrong with the links of a built site, one sentence for each fault."""
    found = {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    linked = set()
    for path, page in found.items():
        name = path.relative_to(site)
        for link in sorted({*page.links, *page.loads}):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads and parts.scheme != "data":
                    yield f"{name} loads {link}; the site must bring it along"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            linked |= {target} if target != path else set()
            if not target.is_file():
                yield f"{name} links to {link}, which is not there"
            elif target in found and unquote(parts.fragment) not in found[target].places | {""}:
                yield f"{name} links to {link}, which has no such place"
    for path in found:
        if path not in linked and path != site / "index.html":
            yield f"{path.relative_to(site)} is linked from nowhere"
    for style in sorted(site.rglob("*.css")):
        for url in re.findall(r"(?:@import\s+|url\()[\"']?(https?:[^)\"']+)", style.read_text()):
            yield f"{style.relative_to(site)} loads {url}; the site must bring it along"


if __name__ == "__main__":
    main()
