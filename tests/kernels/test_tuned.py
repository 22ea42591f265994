"""A table of tuned configs overrides the rule where it has a row; a damaged table is refused with
the reason."""

import json
from dataclasses import dataclass

import pytest

from fastdiff.kernels import choices, tuned
from fastdiff.kernels.tuned import Pick, forced, key, recorded, tunable

MEASURED = {
    "case": "sd15-64",
    "dtype": "float16",
    "samples_ms": [1.0, 1.1],
    "rule_samples_ms": [2.0, 2.2],
    "ratio": {"median": 2.0, "lo": 1.9, "hi": 2.1},
}
ROW = {
    "op": "norm",
    "key": {"L": 4096, "size": 2},
    "config": {"block": 512, "num_warps": 8},
    "rule": {"block": 128, "num_warps": 4},
    "measured": [MEASURED],
}
TABLE = {
    "schema": "fastdiff.tuned/1",
    "arch": 90,
    "machine": {},
    "versions": {},
    "commit": "abc1234",
    "command": "python -m benchmarks.tune",
    "rows": [ROW],
}


@dataclass(frozen=True)
class LaunchConfig:
    block: int
    num_warps: int


@tunable("norm")
def pick(L: int, size: int, arch: int) -> LaunchConfig:
    if L < 1:
        raise ValueError("no rows")
    return LaunchConfig(128, 4)


RULE, TUNED = LaunchConfig(128, 4), LaunchConfig(512, 8)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """planted(document): make this the table of sm_90."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)

    def plant(document):
        text = document if isinstance(document, str) else json.dumps(document)
        (tmp_path / "sm_90.json").write_text(text)
        tuned.table.cache_clear()

    yield plant
    tuned.table.cache_clear()


def test_a_row_of_the_architecture_is_used_and_nothing_else(planted):
    planted(TABLE)
    assert pick(4096, 2, 90) == pick(size=2, arch=90, L=4096) == TUNED
    assert pick(4096, 4, 90) == pick(1024, 2, 90) == RULE
    assert pick(4096, 2, 80) == pick(4096, 2, 0) == RULE


def test_a_row_does_not_allow_what_the_rule_refuses(planted):
    planted(TABLE | {"rows": [ROW | {"key": {"L": 0, "size": 2}}]})
    with pytest.raises(ValueError, match="no rows"):
        pick(0, 2, 90)


def test_a_key_does_not_depend_on_the_order_of_names():
    assert key({"size": 2, "L": 4096, "arch": 90}) == key({"L": 4096, "size": 2}) == "L=4096,size=2"


def test_forced_holds_only_in_its_block_and_for_its_op(planted):
    planted(TABLE)
    other = LaunchConfig(64, 2)
    with forced("norm", other), forced("attention", None):
        assert pick(4096, 2, 90) == pick(7, 2, 80) == other
        with forced("norm", None):
            assert pick(4096, 2, 90) == RULE
    assert pick(4096, 2, 90) == TUNED


def test_picks_are_recorded_as_integers():
    with recorded() as picks:
        pick(7, 2, arch=80)
        pick(True, 2, arch=80)
    pick(8, 2, arch=80)
    asked = [{"L": 7, "size": 2, "arch": 80}, {"L": 1, "size": 2, "arch": 80}]
    assert picks == [Pick("norm", arguments, RULE) for arguments in asked]
    assert [key(pick.arguments) for pick in picks] == ["L=7,size=2", "L=1,size=2"]


def test_a_pick_without_an_architecture_has_no_table():
    with pytest.raises(TypeError, match=r"norm: pick\(L\) takes no arch"):
        tunable("norm")(lambda L: RULE)


def without(name):
    return {at: value for at, value in TABLE.items() if at != name}


DAMAGED = {
    "no JSON": ("{", "Expecting property name"),
    "a list": ([], "list indices"),
    "other schema": (TABLE | {"schema": "fastdiff.tuned/2"}, "schema 'fastdiff.tuned/2', not"),
    "dry run": (TABLE | {"dry_run": True}, "a dry run"),
    "other GPU": (TABLE | {"arch": 80}, "for sm_80, not for sm_90"),
    "no commit": (without("commit"), "it has no 'commit'"),
    "no rows": (without("rows"), "it has no 'rows'"),
    "float": (TABLE | {"rows": [ROW | {"config": {"block": 1.5}}]}, "should be integers"),
    "twice": (TABLE | {"rows": [ROW, ROW]}, r"norm \(L=4096,size=2\) occurs twice"),
    "unmeasured": (TABLE | {"rows": [ROW | {"measured": []}]}, "was never measured"),
    "slower": (
        TABLE | {"rows": [ROW | {"measured": [MEASURED | {"ratio": {"lo": 0.99}}]}]},
        "not faster than the default on sd15-64",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_table_is_refused_by_name(planted, name):
    document, message = DAMAGED[name]
    planted(document)
    with pytest.raises(ValueError, match=message) as caught:
        pick(4096, 2, 90)
    assert "sm_90.json: " in str(caught.value)
    assert str(caught.value).endswith("; tune again or remove it")


@pytest.mark.parametrize("config", [{"block": 512}, {"block": 512, "num_warps": 8, "stages": 2}])
def test_a_config_with_other_fields_than_the_rules_is_an_error(planted, config):
    planted(TABLE | {"rows": [ROW | {"config": config}]})
    with pytest.raises(ValueError, match=r"norm \(L=4096,size=2\) differs from LaunchConfig in "):
        pick(4096, 2, 90)
    assert pick(1, 2, 90) == RULE


def test_every_committed_table_can_be_read():
    assert tuned.FOLDER == choices.FOLDER
    readers = {
        "sm": lambda path, arch: tuned.read(path, int(arch)),
        "cpu": choices.read,
    }
    for path in tuned.FOLDER.glob("*.json"):
        kind, _, of = path.stem.partition("_")
        readers[kind](path, of)
