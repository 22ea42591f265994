"""The command line: bad input is one red sentence and exit code 2, and data goes to stdout."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import triton
import typer
from diffusers import StableDiffusionPipeline
from disks import small_disk
from PIL import Image

from fastdiff.cli import app, main
from fastdiff.cli.facts import COLUMNS
from fastdiff.demo import DEMO_FOLDER, load_demo


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


BAD = {
    "--steps is 0": ("bench", "--steps", "0"),
    "--rounds is 1": ("bench", "--rounds", "1"),
    "--backends is 'warp'; choose from eager": ("bench", "--backends", "warp"),
    "--preset is 'sd9'; choose one of sd15": ("bench", "--preset", "sd9"),
    "--scale is 3": ("bench", "--preset", "tiny", "--scale", "3"),
    "--scale needs --preset": ("bench", "--scale", "0.5"),
    "give one of them": ("bench", "{tmp}", "--preset", "tiny"),
    "is neither an existing folder": ("bench", "{tmp}/nothing"),
    "has no model_index.json": ("bench", "{tmp}"),
    "--scale is nan": ("bench", "--preset", "tiny", "--scale", "nan"),
    "--height is 70": ("bench", "--height", "70"),
    "--dtype is 'int8'": ("bench", "--dtype", "int8"),
    "--device is 'toaster'": ("bench", "--device", "toaster"),
    "{tmp}/no does not exist": ("bench", "--json", "{tmp}/no/x.json"),
}
OUT = ("--out", "{tmp}/x.png")
BAD_GENERATE = {
    "--steps is 0": (*OUT, "--steps", "0"),
    "--steps is 2000": (*OUT, "--steps", "2000"),
    ".psd": (*OUT[:-1], "a.psd"),
    "has no model_index.json": (*OUT, "{tmp}"),
    "is neither an existing folder": (*OUT, "{tmp}/nothing"),
    "--width is 12": (*OUT, "--width", "12"),
    "--dtype is 'int8'": (*OUT, "--dtype", "int8"),
    "{tmp}/no does not exist": ("--out", "{tmp}/no/x.png"),
    "Pillow cannot write colours as .xyz": ("--out", "{tmp}/x.xyz"),
    "Pillow cannot write colours as .xbm": ("--out", "{tmp}/x.xbm"),
    "--out {tmp} is a folder": ("--out", "{tmp}"),
    "--guidance-scale is nan": (*OUT, "--guidance-scale", "nan"),
    "--guidance-scale is inf": (*OUT, "--guidance-scale", "1e999"),
    "--guidance-scale is -inf": (*OUT, "--guidance-scale=-inf"),
    "--steps is -3": (*OUT, "--steps", "-3"),
    "--height is 0": (*OUT, "--height", "0"),
    "--height is -64": (*OUT, "--height", "-64"),
    "--device is 'gpu'": (*OUT, "--device", "gpu"),
}


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        *BAD.items(),
        *(
            (message, ("generate", "--prompt", "sun", *more))
            for message, more in BAD_GENERATE.items()
        ),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, capsys, message, arguments):
    code = run(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("fastdiff: ")
    assert err.count("\n") == 1
    assert message.replace("{tmp}", str(tmp_path)) in err
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_exit_with_2(capsys):
    assert run("bench", "--warp") == 2
    assert "No such option" in capsys.readouterr().err


def test_an_error_is_red_unless_no_color_is_set(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    run("bench", "--steps", "0")
    assert "\x1b[31m" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    run("bench", "--steps", "0")
    assert "\x1b[31m" not in capsys.readouterr().err


def test_generate_writes_the_picture_that_diffusers_draws(tmp_path, capsys):
    path = tmp_path / "heart.png"
    shared = ("--steps", "3", "--seed", "5", "--device", "cpu", "--eager")
    assert (
        run(
            "generate", "--prompt", "red heart", "--out", path, "--negative-prompt", "blue", *shared
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out == f"{path}\n"
    pipe = load_demo()
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "red heart",
        negative_prompt="blue",
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(expected))
    assert [item.name for item in tmp_path.iterdir()] == ["heart.png"]


def test_generate_compiled_draws_the_same_picture(tmp_path):
    pictures = []
    for more in ((), ("--eager",)):
        path = tmp_path / f"{len(more)}.png"
        arguments = ("--steps", "4", "--device", "cpu", "--out", path, *more)
        assert run("generate", "--prompt", "sunflower", *arguments) == 0
        pictures.append(np.asarray(Image.open(path)).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # one level of 8 bits


def test_several_prompts_make_numbered_files_that_overwrite_none(tmp_path, capsys):
    shared = ("--steps", 2, "--seed", 7, "--device", "cpu", "--eager")
    several = ("--prompt", "red heart", "--prompt", "sunflower")
    out = tmp_path / "x.png"
    (tmp_path / "x-3.png").write_bytes(b"mine")
    (tmp_path / "x-9.jpg").write_bytes(b"not a .png")
    assert run("generate", *several, "--out", out, *shared) == 0
    names = [str(tmp_path / f"x-{n}.png") for n in (4, 5)]
    assert capsys.readouterr().out.split() == names
    assert (tmp_path / "x-3.png").read_bytes() == b"mine"
    assert run("generate", "--prompt", "sunflower", "--out", out, *shared) == 0
    assert out.read_bytes() == (tmp_path / "x-5.png").read_bytes(), "a prompt draws the same alone"
    assert out.read_bytes() != (tmp_path / "x-4.png").read_bytes()
    assert len(list(tmp_path.iterdir())) == 5


def test_a_failed_picture_leaves_the_earlier_ones(tmp_path, capsys, monkeypatch):
    pictures = [np.zeros((1, 8, 8, 3)), np.full((1, 8, 8, 3), np.nan)]
    monkeypatch.setattr(
        StableDiffusionPipeline,
        "__call__",
        lambda pipe, prompt, height, guidance_scale=1, **more: SimpleNamespace(
            images=pictures.pop(0)
        ),
    )
    several = ("--prompt", "sun", "--prompt", "moon")
    assert run("generate", *several, "--out", tmp_path / "x.png", "--eager") == 2
    assert "not finite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x-1.png"]


def test_values_that_are_not_finite_make_no_picture(tmp_path, capsys):
    path = tmp_path / "x.png"
    scale = ("--guidance-scale", "1e38")
    assert (
        run("generate", "--prompt", "sun", "--out", path, "--steps", 2, "--device", "cpu", *scale)
        == 2
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert "not finite, in torch.float32 with guidance 1e+38; give a smaller" in err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_picture(tmp_path, capsys):
    with small_disk(tmp_path, 4096) as reason:
        path = tmp_path / "x.tiff"  # not compressed: 12 kB
        assert (
            run("generate", "--prompt", "sun", "--out", path, "--steps", 1, "--device", "cpu") == 2
        )
        assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.strip() == f"fastdiff: {path} cannot be written: {reason}"


def test_a_full_device_file_is_not_removed(tmp_path, capsys):
    path = tmp_path / "x.png"
    path.symlink_to("/dev/full")
    assert run("generate", "--prompt", "sun", "--out", path, "--steps", 1, "--device", "cpu") == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert path.is_char_device()


def test_a_picture_too_large_for_its_format_is_one_sentence(tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.webp"
    monkeypatch.setattr(
        StableDiffusionPipeline,
        "__call__",
        lambda pipe, prompt, height, guidance_scale=1, **kwargs: SimpleNamespace(
            images=np.zeros((1, 16384, 8, 3))
        ),
    )
    assert run("generate", "--prompt", "sun", "--out", path, "--eager") == 2
    assert "x.webp cannot be written: encoding error 5" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_default_guidance_scale_is_the_pipelines(tmp_path, monkeypatch):
    asked = []

    def call(pipe, prompt, height, guidance_scale=5.5, **kwargs):
        asked.append(guidance_scale)
        return SimpleNamespace(images=np.zeros((1, 8, 8, 3)))

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    for more in ((), (DEMO_FOLDER,), (DEMO_FOLDER, "--guidance-scale", "0")):
        assert (
            run("generate", "--prompt", "sun", "--out", tmp_path / "x.png", "--eager", *more) == 0
        )
    assert asked == [4.0, 5.5, 0.0]


def test_help_names_the_default_dtype_of_export(tmp_path, capsys):
    assert run("export", "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "Default: fp32, with --trt fp16." in text
    file = tmp_path / "export.json"
    for option, kinds in (("--onnx", {"float32"}), ("--trt", {"float16"})):
        more = ("--target", "sm_89") if option == "--trt" else ()
        where = ("--out", tmp_path / "x", "--json", file)
        assert run("export", option, *more, "--dry-run", *where) == 0
        document = json.loads(file.read_text())
        rows = document.get("parts") or document["engines"]
        assert {row["dtype"] for row in rows} == kinds


def test_env_prints_lines_or_writes_json(capsys, tmp_path):
    assert run("env") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("- ") and ": " in line for line in lines)
    assert f"- torch: {torch.__version__}" in lines
    assert run("env", "--json", tmp_path / "env.json") == 0
    facts = json.loads((tmp_path / "env.json").read_text())
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert {"fastdiff", "python", "diffusers", "cpu", "fastdiff._C", "commit"} <= set(facts)


@dataclass(frozen=True)
class StaticRow:
    op: str
    arch: int
    kernel: str = "_statistics_kernel"
    case: str = "sdxl-cfg-multistep"
    dtype: str = "float16"
    num_warps: int = 8
    num_stages: int = 3
    registers: int = 96
    spills: int = 0
    shared: int = 131072
    occupancy: float = 0.3125
    limited_by: str = "shared memory"
    load: int = 16
    store: int = 2
    wants_load: int = 16
    narrow: int = 3
    mma: str = "tcgen05.mma"
    bound: str = "compute"
    faults: ClassVar[list[str]] = []


@pytest.fixture
def static_table(monkeypatch):
    """A stand-in for the table of compiled kernels, which takes minutes to compile."""

    def table(archs, cases, ops, log):
        return [StaticRow(op, arch) for op in ops or ["attention", "guided_step"] for arch in archs]

    module = ModuleType("fastdiff.kernels.inspect")
    module.SHARED_LIMIT = {90: 227, 120: 99}
    module.table = table
    monkeypatch.setitem(sys.modules, "fastdiff.kernels.inspect", module)


def test_inspect_writes_its_document(static_table, tmp_path):
    out = tmp_path / "kernels.json"
    assert run("inspect", "group_norm_silu", "--arch", "90", "--json", out) == 0
    document = json.loads(out.read_text())
    assert document["schema"] == "fastdiff.static/1"
    assert document["versions"] == {"triton": triton.__version__}
    assert document["command"] == f"fastdiff inspect group_norm_silu --arch 90 --json {out}"
    assert "commit" in document
    assert document["rows"] == [asdict(StaticRow("group_norm_silu", 90))]


def test_inspect_prints_a_row_for_each_kernel(static_table, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert run("inspect", "--arch", "90", "--arch", "120") == 0
    printed = capsys.readouterr().out.splitlines()
    (head,) = (line for line in printed if line[:1] == "┃")
    assert all(name in head for name in ("regs", "spill", "occupancy", "limited by", "load B"))
    lines = [line for line in printed if line[:1] == "│"]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    legend = " ".join(printed[printed.index(lines[-1]) + 2 :])
    assert all(
        f"{name}: " in legend or f"{name}, " in legend for name in list(COLUMNS.values())[1:]
    )
    kernel = "_statistics_kernel · sdxl-cfg-multistep · float16"
    ops = ["attention"] * 2 + ["guided_step"] * 2
    assert [row[0] for row in rows] == [
        f"{op} · {kernel} · sm_{arch}" for op, arch in zip(ops, [90, 120] * 2, strict=True)
    ]
    assert all(row[6:8] == ["31%", "shared memory"] for row in rows)


def test_inspect_exits_with_1_and_names_each_fault(static_table, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(StaticRow, "faults", ["attention, sm_90: spills 8 bytes a thread"])
    out = tmp_path / "kernels.json"
    assert run("inspect", "attention", "--arch", "90", "--json", out) == 1
    assert capsys.readouterr().err.endswith("attention, sm_90: spills 8 bytes a thread\n")
    assert json.loads(out.read_text())["rows"]


def test_inspect_names_the_valid_choices(static_table, capsys, tmp_path):
    refused = {
        ("--arch", "75"): "--arch is 75; choose from 90, 120",
        ("conv2d",): "nor one of our Triton kernels, which are",
        (str(tmp_path), "--models"): "leave out --models",
        ("attention", "--json", str(tmp_path / "no" / "x.json")): "make it first",
    }
    for arguments, message in refused.items():
        assert run("inspect", *arguments) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def commands():
    group = typer.main.get_command(app)
    return dict(group.commands)


def test_options_mean_the_same_in_every_command():
    """--json takes the file to write, --out what to make, and the pipeline is positional."""
    takes = {"pipeline": set(), "--json": set(), "--out": set()}
    for name, command in commands().items():
        for parameter in command.params:
            for option in takes.keys() & {parameter.name, *parameter.opts}:
                takes[option].add(name)
                assert not getattr(parameter, "is_flag", False), (name, option)
                positional = parameter.param_type_name == "argument"
                assert positional == (option == "pipeline"), (name, option)
    compared = {"bench", "compare", "count", "export", "graph", "roofline"}
    assert takes["pipeline"] == compared | {"doctor", "generate", "serve", "warm"}
    assert takes["--json"] == compared | {"doctor", "env", "inspect", "report"}
    assert takes["--out"] == {"export", "generate", "warm"}


@pytest.mark.parametrize("name", commands())
def test_each_option_has_a_help_text(name):
    """The text ends with a full stop."""
    for parameter in commands()[name].params:
        if parameter.name != "help":
            assert (getattr(parameter, "help", None) or "").endswith("."), parameter.name


def test_importing_the_cli_imports_no_heavy_package():
    code = (
        "import sys, fastdiff.cli; heavy = {'torch', 'diffusers', 'numpy', 'scipy', 'PIL'}; "
        "sys.exit(f'imported: {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("bench", "generate", "env", "inspect"))
