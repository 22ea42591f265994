"""`generate --prompts`: a picture for each row of a file; after a kill exactly the missing ones."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from command import environment, run
from forked import DOCS, commands, write_prompts
from PIL import Image

from fastdiff.bulk.job import check, opened
from fastdiff.bulk.prompts import Row, read
from fastdiff.errors import UserError

GENERATE = "main(sys.argv[1:])"
KILLED = """
from pathlib import Path
place, count, *arguments = sys.argv[1:]

left = int(count)
def reached():
    "Kill this process at the `count`th time."
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

def killing(owner, name, half=None):
    own = getattr(owner, name)
    def call(self, *args, **kwargs):
        reached()
        return own(self, *args, **kwargs)
    setattr(owner, name, call)

job = fastdiff.bulk.job
if place == "batch":
    from fastdiff.runtime.places import Places
    killing(Places, "advance")
elif place == "step":
    from fastdiff.runtime.loop import Run
    killing(Run, "advance")
elif place == "half a picture":
    own = job._write
    def half(path, picture):
        own(path, picture[: len(picture) // 2])
        reached()
        own(path, picture)
    job._write = half
elif place == "line":
    killing(job.Job, "_add")
elif place == "half a line":
    own = job.Job._add
    def add(self, row, what):
        own(self, row, what)
        self._manifest.truncate(self._manifest.tell() - 20)
        reached()
    job.Job._add = add
main(arguments)
"""
KILLS = {"step": 3, "half a picture": 2, "line": 3, "half a line": 1}


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path):
    """A file of twelve rows, one of which sets more than the prompt."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"red heart {n % 3}", "id": f"é{n}"} for n in range(12)]
    rows[1] |= {"seed": 7, "steps": 2, "guidance": 2.5, "negative": "blue", "size": "64x64"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_after_a_kill_at_any_place_exactly_the_missing_pictures_are_drawn(
    forked, prompts, tmp_path
):
    options = ("--steps", "1", "--device", "cpu")
    whole, folder = tmp_path / "whole", tmp_path / "killed"

    def arguments(out):
        return ("generate", "--prompts", str(prompts), "--out", str(out), *options)

    code, out, err = forked(GENERATE, *arguments(whole))
    assert code == 0, err
    assert out == f"{whole}/manifest.jsonl\n"
    assert "12 of 12 drawn" in err
    drawn = 0
    for place, count in KILLS.items():
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.png")}
        code, out, err = forked(KILLED, place, str(count), *arguments(folder))
        assert code == -9, (place, code, err)
        for path in folder.glob("[0-9]*.png"):
            Image.open(path).load()  # a file with its final name is complete
            assert before.get(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
        assert len(list(folder.glob("[0-9]*.png"))) > drawn
        drawn = len(list(folder.glob("[0-9]*.png")))
    code, out, err = forked(GENERATE, *arguments(folder))
    assert code == 0, err
    assert (folder / "manifest.jsonl").read_bytes() == (whole / "manifest.jsonl").read_bytes()
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in folder.iterdir())
    lines = manifest(folder)
    assert [line["row"] for line in lines] == list(range(1, 13))
    assert len({line["sha256"] for line in lines}) == 12, "rows of one prompt have different seeds"
    for line in lines:
        for one in (whole, folder):
            picture = (one / line["file"]).read_bytes()
            assert hashlib.sha256(picture).hexdigest() == line["sha256"]
    second = {key: lines[1][key] for key in ("prompt", "seed", "steps", "guidance", "negative")}
    assert second == {"prompt": "red heart 1", "seed": 7, "steps": 2, "guidance": 2.5} | {
        "negative": "blue"
    }
    assert (lines[1]["width"], lines[1]["height"], lines[1]["id"]) == (64, 64, "é1")
    assert (lines[0]["steps"], lines[0]["guidance"]) == (1, 4.0)
    one = tmp_path / "one.png"
    options = ("--prompt", "red heart 1", "--negative-prompt", "blue", "--guidance-scale", "2.5")
    options = (*options, "--seed", "7", "--steps", "2", "--device", "cpu", "--eager")
    code, _, err = forked(GENERATE, "generate", *options, "--out", str(one))
    assert code == 0, err
    ours, theirs = (np.asarray(Image.open(p)).astype(int) for p in (folder / "02.png", one))
    assert np.abs(ours - theirs).max() <= 1  # one level of 8 bits from diffusers' picture


def test_two_workers_draw_the_same_pictures_as_one(forked, prompts, tmp_path):
    """Two workers are killed during a step; the next run draws the rest, none twice. Each picture
    equals the one that a single worker draws."""
    options = ("--steps", "2", "--device", "cpu")
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    given = ("generate", "--prompts", str(prompts), *options, "--out")
    code, _, err = forked(GENERATE, *given, str(whole))
    assert code == 0, err
    code, _, err = forked(KILLED, "batch", "11", *given, str(folder), "--workers", "2")
    assert code == -9, err
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.png")}
    assert 0 < len(before) < 12
    code, _, err = forked(GENERATE, *given, str(folder), "--workers", "2")
    assert code == 0, err
    assert all((folder / name).stat().st_mtime_ns == when for name, when in before.items())
    assert (folder / "manifest.jsonl").read_bytes() == (whole / "manifest.jsonl").read_bytes()


def test_pictures_without_memory_for_a_batch_are_drawn_alone(forked, tmp_path):
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("red heart\nsun\nsnow\n")
    fails = """
from fastdiff.batching.groups import Group
own = Group.advance
def advance(self):
    asked = [drawing.ticket.request.prompt for drawing in self.drawings]
    if len(asked) > 1 and "sun" in asked:
        raise MemoryError("two are too many")
    own(self)
Group.advance = advance
main(sys.argv[1:])
"""
    arguments = ("generate", "--prompts", str(prompts), "--out", str(folder), "--steps", "1")
    code, _, err = forked(fails, *arguments, "--capacity", "2")
    assert code == 0, err
    assert [line["file"] for line in manifest(folder)] == ["1.png", "2.png", "3.png"]


def test_pictures_that_cannot_share_steps_are_batched_only_on_request(forked, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("sun\n" * 5)
    script = """
from fastdiff.batching import drawing
from fastdiff.bulk.painter import Painter
drawing._obstacle = lambda _: "it may not"
Painter.capacity = 2  # as on a GPU
own = Painter.attempt
def attempt(self, row):
    print(row.number)
    return own(self, row)
Painter.attempt = attempt
main(sys.argv[1:])
"""
    for options, alone in (((), "4\n5\n"), (("--capacity", "2"), "")):
        folder = tmp_path / f"out{len(options)}"
        given = ("generate", "--prompts", str(prompts), "--out", str(folder), "--steps", "1")
        code, out, err = forked(script, *given, *options)
        assert code == 0, err
        assert out == f"{alone}{folder}/manifest.jsonl\n"
        assert [line["file"] for line in manifest(folder)] == [f"{n}.png" for n in range(1, 6)]


def test_a_failed_row_does_not_stop_the_others(forked, tmp_path):
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("red heart\n\nsun\nsnow\n")
    fails = """
own = fastdiff.bulk.painter.Painter.draw
def draw(self, row):
    if row.prompt == "sun":
        raise ZeroDivisionError("too bright")
    return own(self, row)
fastdiff.bulk.painter.Painter.draw = draw
main(sys.argv[1:])
"""
    arguments = ("generate", "--prompts", str(prompts), "--out", str(folder), "--steps", "1")
    code, _, err = forked(fails, *arguments)
    assert code == 1
    assert "1 of 3 rows failed, the first of them row 2: ZeroDivisionError: too bright" in err
    assert [line.get("error") for line in manifest(folder)] == [
        None,
        "ZeroDivisionError: too bright",
        None,
    ]
    first = (folder / "1.png").stat().st_mtime_ns
    code, _, err = forked(GENERATE, *arguments)
    assert code == 0, err
    assert all("file" in line for line in manifest(folder))
    assert (folder / "1.png").stat().st_mtime_ns == first


BAD = {
    "x.doc: give a file that ends in .txt, .csv": ("x.doc", "sun"),
    "No such file": ("none.txt", None),
    "holds no prompt": ("x.txt", " \n\n"),
    "is not UTF-8": ("x.txt", b"caf\xe9"),
    "line 1: the columns are text, size; one must be prompt": ("x.csv", "text,size\na,b\n"),
    "line 1: two columns are called 'id'": ("x.csv", "prompt,id,id\na,b,c\n"),
    "line 3: it has more values than there are columns": ("x.csv", "prompt\nsun\na,b\n"),
    "line 4: it has no prompt": ("x.csv", 'prompt,id\n"a\nb",1\n,2\n'),
    "line 2: steps is '2.5'; give a whole number of at least 1": ("x.csv", "prompt,steps\na,2.5"),
    "line 2: it is not JSON": ("x.jsonl", '{"prompt": "sun"}\n{"prompt"\n'),
    "line 1: it is '[1]'; give {": ("x.jsonl", "[1]"),
    "line 1: prompt is 3; give a text": ("x.jsonl", '{"prompt": 3}'),
    "line 1: seed is -1; give a whole number from 0": ("x.jsonl", '{"prompt": "a", "seed": -1}'),
    "line 1: seed is True": ("x.jsonl", '{"prompt": "a", "seed": true}'),
    "line 1: guidance is nan; give a number": ("x.jsonl", '{"prompt": "a", "guidance": NaN}'),
    "line 1: size is '12'; give width x height": ("x.jsonl", '{"prompt": "a", "size": "12"}'),
    "line 1: the column 'file' is the manifest's own": ("x.jsonl", '{"prompt": "a", "file": 1}'),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rows_are_named_by_their_line(message, tmp_path):
    name, text = BAD[message]
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read(path, 0)
    assert message in str(caught.value)


def test_rows_that_the_pipeline_refuses_are_named_before_drawing(forked, tmp_path):
    prompts, folder = tmp_path / "prompts.csv", tmp_path / "out"
    arguments = ("generate", "--prompts", str(prompts), "--out", str(folder))
    for column, value, message in (
        ("size", "70x64", "line 3: width is 70; this pipeline needs a positive multiple of 8"),
        ("steps", "2000", "line 3: steps is 2000; this scheduler allows at most 1000 steps"),
    ):
        prompts.write_text(f"prompt,{column}\nred heart,\nsun,{value}\n")
        code, _, err = forked(GENERATE, *arguments)
        assert (code, message in err) == (2, True), err
        assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    code, _, err = forked(GENERATE, *arguments)
    assert (code, "holds mine.txt, which belongs to no job" in err) == (2, True), err


def test_rows_are_the_same_from_csv_jsonl_and_parquet(tmp_path):
    """CSV holds texts, JSON numbers, and Parquet numbers with missing values."""
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"prompt": "red, heart", "seed": 5, "steps": None, "guidance": 2.5, "id": "a"},
        {"prompt": "sun", "seed": None, "steps": 4, "guidance": None, "id": "b"},
    ]
    written = {name: tmp_path / f"x.{name}" for name in ("csv", "jsonl", "parquet")}
    written["csv"].write_text('prompt,seed,steps,guidance,id\n"red, heart",5,,2.5,a\nsun,,4,,b\n')
    written["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), written["parquet"])
    read_of = {name: [row.told() for row in read(path, 3)] for name, path in written.items()}
    assert read_of["csv"] == read_of["jsonl"] == read_of["parquet"]
    first, second = read_of["csv"]
    assert (first["seed"], second["steps"]) == (5, 4)
    assert 0 <= second["seed"] < 2**53
    assert [row.told() for row in read(written["csv"], 3)] == read_of["csv"], "in each run"
    assert read(written["csv"], 4)[1].seed != second["seed"], "another job seed gives other seeds"
    written["parquet"].write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is not a Parquet file"):
        read(written["parquet"], 0)


def test_a_folder_belongs_to_one_job_and_one_process(tmp_path):
    rows, asked, folder = [Row(1, 1, "sun", 0)], {"steps": 25, "dtype": "fp32"}, tmp_path / "out"
    with (
        opened(folder, rows, rows, asked),
        pytest.raises(UserError, match="another process is drawing into it"),
        opened(folder, rows, rows, asked),
    ):
        pass
    check(folder, rows, asked)
    with pytest.raises(UserError, match="was begun with steps 25; got 3. Give the same options"):
        check(folder, rows, asked | {"steps": 3})
    for others in ([Row(1, 1, "moon", 0)], [Row(1, 1, "sun", 1)], [*rows, Row(2, 2, "sun", 0)]):
        with pytest.raises(UserError, match="holds a job with other prompts; give the same file"):
            check(folder, others, asked)
    (folder / "job.json").write_text("{")
    with pytest.raises(UserError, match=r"job.json is damaged; give a new folder"):
        check(folder, rows, asked)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; with --prompts give a folder"):
        check(tmp_path / "file", rows, asked)


def test_options_that_need_or_exclude_others(tmp_path):
    prompts = tmp_path / "x.txt"
    prompts.write_text("sun")
    for arguments, message in {
        (): "give --prompt, once or several times, or --prompts with a file",
        ("--prompt", "sun", "--ray", "local"): "--ray needs --prompts",
        ("--prompt", "sun", "--workers", 2): "--workers needs --prompts",
        ("--prompts", prompts, "--gpus-per-worker", 1): "--gpus-per-worker needs --ray",
        (
            "--prompts",
            prompts,
            "--workers",
            2,
            "--eager",
        ): "leave out --workers: --eager draws one picture",
        ("--prompts", prompts, "--parallel", "data"): "start them by torchrun",
        ("--prompts", prompts, "--parallel", "both"): "choose guidance or data",
    }.items():
        code, _, err = run("generate", *arguments, "--out", tmp_path / "out")
        assert (code, message in err) == (2, True), err


def test_the_pages_commands_write_the_manifest_that_it_shows(forked, tmp_path):
    command, by_workers, by_ray = commands("bulk.md")
    assert by_ray[: len(command)] == by_workers[: len(command)] == command
    here = "os.chdir(sys.argv.pop(1))\n"
    for folder, given in ((tmp_path / "workers", by_workers), (tmp_path, command)):
        folder.mkdir(exist_ok=True)
        write_prompts(folder)
        code, _, err = forked(here + GENERATE, str(folder), *given[1:])
        assert code == 0, err
    assert manifest(tmp_path / "workers/pictures") == manifest(tmp_path / "pictures")
    line = json.loads(re.search(r"```json\n(.*?)```", (DOCS / "bulk.md").read_text(), re.S)[1])
    made = manifest(tmp_path / "pictures")[1]
    fixed = [key for key in line if key not in ("bytes", "sha256", "seed")]
    assert made.keys() == line.keys()
    assert {key: made[key] for key in fixed} == {key: line[key] for key in fixed}


@pytest.mark.slow  # Ray starts a dozen processes
def test_the_pages_ray_command_draws_the_same(forked, tmp_path):
    command, _, by_ray = commands("bulk.md")
    write_prompts(tmp_path)
    made = []
    for arguments in (command, by_ray):
        given = [sys.executable, "-m", *arguments]
        subprocess.run(given, check=True, cwd=tmp_path, env=environment())
        made.append((tmp_path / "pictures/manifest.jsonl").read_bytes())
        shutil.rmtree(tmp_path / "pictures")
    assert made[0] == made[1]
