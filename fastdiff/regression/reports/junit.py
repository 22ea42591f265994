"""A comparison as JUnit XML, which CI servers show as tests."""

from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from fastdiff.regression.comparison import UNDECIDED, Comparison, Line
from fastdiff.regression.reports import words

SUITE = "fastdiff report"


def junit(comparison: Comparison) -> str:
    """A test case per line: slower is a failure, undecided is skipped."""
    lines = comparison.lines
    totals = {
        "tests": str(len(lines)),
        "failures": str(comparison.count("slower")),
        "errors": "0",
        "skipped": str(sum(line.verdict in UNDECIDED for line in lines)),
        "time": _seconds(sum(map(_ms, lines))),
    }
    root = Element("testsuites", {"name": SUITE, **totals})
    suite = SubElement(root, "testsuite", {"name": SUITE, **totals})
    properties = SubElement(suite, "properties")
    for name, value in _properties(comparison):
        SubElement(properties, "property", {"name": name, "value": _clean(value)})
    for line in lines:
        _case(suite, line)
    ElementTree.indent(root, " ")
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _case(suite: Element, line: Line) -> None:
    coarse, _, fine = _clean(line.name).partition(words.SEPARATOR)
    case = SubElement(
        suite,
        "testcase",
        {
            "classname": coarse if fine else "benchmarks",
            "name": fine or coarse,
            "time": _seconds(_ms(line)),
        },
    )
    facts = (
        f"{words.amount(line.base, line.unit)} → {words.amount(line.new, line.unit)}, "
        f"ratio {words.change(line.ratio, line.lo, line.hi)}, n {words.rounds(line)}"
    )
    note = f"; {_clean(line.note)}" if line.note else ""
    message = f"{words.verdict(line)}: {facts}{note}"
    if line.verdict == "slower":
        SubElement(case, "failure", {"type": words.verdict(line), "message": message}).text = facts
    elif line.verdict in UNDECIDED:
        SubElement(case, "skipped", {"message": message})
    else:
        SubElement(case, "system-out").text = message


def _properties(comparison: Comparison) -> list[tuple[str, str]]:
    found = [("rule", words.rule(comparison)), ("command", comparison.command)]
    for side, state in (("base", comparison.base), ("new", comparison.new)):
        found += [
            (f"{side}.name", state.name),
            (f"{side}.commit", state.commit or words.NONE),
            (f"{side}.created", state.created or words.NONE),
            (f"{side}.machine", words.where(state.machine)),
        ]
    for name, base, new in words.versions(comparison):
        found += [(f"base.version.{name}", base), (f"new.version.{name}", new)]
    if comparison.geomean:
        found.append(("geomean", words.geomean(comparison.geomean)))
    return found + [("difference", sentence) for sentence in comparison.differences]


def _clean(text: str) -> str:
    """Remove control characters, which XML cannot hold even escaped."""
    return words.plain(text, limit=None)


def _ms(line: Line) -> float:
    return line.new if line.kind == "time" and line.new is not None else 0.0


def _seconds(ms: float) -> str:
    return f"{ms / 1e3:.9f}"
