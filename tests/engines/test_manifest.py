"""The manifest of an engine's plan: what it must contain, and every way in which the two can
disagree."""

import hashlib
import json
import random

import pytest

from fastdiff.engines import manifest
from fastdiff.errors import UserError

PLAN = random.Random(0).randbytes(5_000_000)  # more than one block of the streamed hash


def document():
    return {
        "schema": "fastdiff.engine/1",
        "part": "unet",
        "flavor": "rtx",
        "version": "1.7.1.116",
        "target": "sm_89",
        "compatible": [],
        "dtype": "float16",
        "opset": 21,
        "inputs": {"sample": ["float16", "batch_size", 4, "height", "width"]},
        "outputs": {"out_sample": ["float16", "batch_size", 4, "height", "width"]},
        "profiles": [{"sample": {"min": [1, 4, 8, 8], "opt": [2, 4, 8, 8], "max": [2, 4, 8, 8]}}],
        "plan_bytes": len(PLAN),
        "plan_sha256": hashlib.sha256(PLAN).hexdigest(),
        "onnx_sha256": "0" * 64,
        "config_sha256": "1" * 64,
        "network_sha256": "2" * 64,
        "numeric_check": None,
        "numeric_check_reason": "no GPU",
        "build_seconds": 3.5,
        "versions": {"torch": "2.13.0", "diffusers": None},
    }


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "sm_89/unet"
    place.mkdir(parents=True)
    (place / "engine.json").write_text(json.dumps(document()))
    (place / "model.plan").write_bytes(PLAN)
    return place


def test_a_whole_engine_is_read(folder):
    made = manifest.read(folder)
    assert made.to_dict() == document()
    assert manifest.check(folder) == made
    assert manifest.plan(folder, made) == PLAN


def test_unknown_keys_are_ignored(folder):
    (folder / "engine.json").write_text(json.dumps(document() | {"note": "by hand"}))
    assert manifest.check(folder).to_dict() == document()


def refused(folder, message):
    """Check that both ways to read a plan fail with one line that has `message` and what to do."""
    for read in (manifest.check, lambda place: manifest.plan(place, manifest.read(place))):
        with pytest.raises(UserError) as caught:
            read(folder)
        sentence = str(caught.value)
        assert message in sentence
        assert "fastdiff export --trt" in sentence
        assert "\n" not in sentence


def test_a_truncated_plan(folder):
    (folder / "model.plan").write_bytes(PLAN[:-1])
    refused(folder, "model.plan has 4999999 bytes, but 5000000 were written")


@pytest.mark.parametrize("place", [0, 1, 2_500_000, 4_194_303, 4_194_304, 4_999_999])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit(folder, place, bit):
    plan = bytearray(PLAN)
    plan[place] ^= 1 << bit
    (folder / "model.plan").write_bytes(plan)
    wrong, right = (hashlib.sha256(content).hexdigest()[:12] for content in (plan, PLAN))
    refused(folder, f"model.plan has SHA-256 {wrong}…, but {right}… was written")


def test_a_missing_file(folder):
    (folder / "model.plan").unlink()
    refused(folder, "model.plan cannot be read: No such file or directory")
    (folder / "engine.json").unlink()
    refused(folder, "holds no engine: engine.json is missing")


@pytest.mark.parametrize("text", ["", "{", "\x00", '{"schema": "fastdiff.engine/1",', "nul"])
def test_a_manifest_that_is_not_json(folder, text):
    (folder / "engine.json").write_text(text)
    refused(folder, "engine.json is not readable JSON")


def test_a_manifest_that_is_not_text(folder):
    (folder / "engine.json").write_bytes(b"\xff\xfe{}")
    refused(folder, "engine.json is not readable JSON")


@pytest.mark.parametrize("value", ["[]", "null", "7", '"fastdiff.engine/1"', "{}"])
def test_a_manifest_without_a_schema(folder, value):
    (folder / "engine.json").write_text(value)
    refused(folder, "engine.json has schema None, but this fastdiff reads fastdiff.engine/1")


def test_another_schema(folder):
    (folder / "engine.json").write_text(json.dumps(document() | {"schema": "fastdiff.engine/2"}))
    refused(folder, "has schema 'fastdiff.engine/2', but this fastdiff reads fastdiff.engine/1")


@pytest.mark.parametrize("key", sorted(document().keys() - {"schema"}))
def test_a_field_of_a_wrong_type(folder, key):
    (folder / "engine.json").write_text(json.dumps(document() | {key: True}))
    refused(folder, f"has True for {key}")


DAMAGED = {
    "part": ["../unet", "", "a/b"],
    "compatible": [[1]],
    "inputs": [{"sample": "float16"}],
    "profiles": [
        *([5], [{"sample": 5}], [{"sample": {"min": [1], "opt": [1]}}]),
        [{"sample": {"min": [1], "opt": [1], "max": [1, 2]}}],
        [{"sample": {"min": ["1"], "opt": [1], "max": [1]}}],
    ],
    "versions": [{"torch": 2}],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in DAMAGED.items() for v in vs])
def test_a_field_with_wrong_contents(folder, key, value):
    (folder / "engine.json").write_text(json.dumps(document() | {key: value}))
    refused(folder, "engine.json has ")


NULLABLE = {"numeric_check", "numeric_check_reason"}


@pytest.mark.parametrize("key", sorted(document().keys() - {"schema"} - NULLABLE))
def test_a_field_that_is_missing(folder, key):
    (folder / "engine.json").write_text(
        json.dumps({name: value for name, value in document().items() if name != key})
    )
    refused(folder, f"has None for {key}")


def test_every_engine_below_a_folder_is_found(folder):
    out = folder.parent.parent
    second = out / "sm_120/unet"
    second.mkdir(parents=True)
    (second / "model.plan").touch()  # a plan without a manifest is found as well
    assert manifest.find(out) == (second, folder)
    assert manifest.find(folder) == (folder,)
    with pytest.raises(UserError, match="holds no engine"):
        manifest.find(out / "none")
