"""JUnit XML against a schema and an independent reader."""

from pathlib import Path

import pytest
import xmlschema
from junitparser import Failure, JUnitXml, Skipped
from regression import synthetic

from fastdiff.regression.reports.junit import junit

SCHEMA = xmlschema.XMLSchema(Path(__file__).with_name("junit.xsd"))


def test_the_schema_rejects_invalid_files():
    text = junit(synthetic.comparison())
    for good, bad in (('tests="16"', 'tests="many"'), ("<failure type=", "<failure kind=")):
        assert good in text
        assert not SCHEMA.is_valid(text.replace(good, bad))


@pytest.mark.parametrize(
    "comparison",
    [synthetic.comparison(), synthetic.hostile(), synthetic.comparison(lines=(), geomean=None)],
    ids=["all", "hostile", "nothing"],
)
def test_reports_are_valid_and_an_independent_reader_agrees(comparison):
    text = junit(comparison)
    SCHEMA.validate(text)
    (suite,) = JUnitXml.fromstring(text.encode())
    cases = list(suite)
    assert suite.tests == len(cases) == len(comparison.lines)
    results = [type(case.result[0]) if case.result else None for case in cases]
    assert suite.failures == results.count(Failure) == comparison.count("slower")
    undecided = comparison.count("inconclusive") + comparison.count("incomparable")
    assert suite.skipped == results.count(Skipped) == undecided
    assert suite.errors == 0


def test_a_test_case_holds_the_verdict():
    (suite,) = JUnitXml.fromstring(junit(synthetic.comparison()).encode())
    slower, *_ = suite
    assert (slower.classname, slower.name) == ("demo, float32", "fastdiff · step")
    assert slower.time == pytest.approx(6.691e-3, rel=1e-3)
    assert slower.result[0].message.startswith("slower: 5.141 ms → 6.691 ms, ratio 1.301 [1.286")
    skipped = next(case for case in suite if case.result and type(case.result[0]) is Skipped)
    assert skipped.result[0].message.endswith("6 more processes would settle it")
    properties = {item.name: item.value for item in suite.properties()}
    assert properties["base.commit"] == "1b4daea"
    assert properties["new.version.torch"] == "2.13.1+cpu"
    assert properties["command"] == "fastdiff report --against main --rounds 15 --processes 4"
