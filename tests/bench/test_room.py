"""A picture too large for memory is one sentence, at once or when torch fails to allocate."""

import resource
from types import SimpleNamespace

import pytest
import torch
from command import run

from fastdiff.bench import room as rooms
from fastdiff.bench.room import available, least, room
from fastdiff.errors import UserError

GIB = 2**30


def test_the_least_memory_of_a_picture_is_one_layer(demo):
    channels = demo.unet.config.block_out_channels[0]
    sample = torch.empty(2, channels, 128 // demo.vae_scale_factor, 64 // demo.vae_scale_factor)
    assert least(demo, 128, 64) == 2 * sample.nbytes


@pytest.mark.parametrize("command", ["generate", "bench", "roofline", "count"])
def test_terabytes_are_refused_at_once(command, tmp_path):
    arguments = ["--prompt", "sun", "--out", tmp_path / "x.png"] if command == "generate" else []
    sides = ("--height", 100_000, "--width", 100_000, "--steps", 2, "--device", "cpu")
    code, out, err = run(command, *arguments, *sides)
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert "--width 100000 and --height 100000 need" in line
    assert "GiB are free; draw fewer pixels" in line
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_allocation_that_torch_refuses_is_one_sentence(demo):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with (
        pytest.raises(UserError, match="--width 64 and --height 72 need more memory than there is"),
        room(demo, 72, 64, "cpu"),
    ):
        torch.empty(available() + GIB, dtype=torch.uint8)  # else granted until written to
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB"),
        MemoryError(),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("Storage size calculation overflowed with sizes=[1]"),
    ],
)
def test_each_out_of_memory_error_is_recognised(demo, error):
    with pytest.raises(UserError, match="need more memory"), room(demo, 64, 64, "cuda"):
        raise error


def test_other_errors_pass_unchanged(demo):
    with pytest.raises(RuntimeError, match="shapes"), room(demo, 64, 64, "cpu"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_the_limit_of_a_control_group_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms, "GROUP", tmp_path)
    free = available()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert available() == pytest.approx(free, rel=0.5)
    (tmp_path / "memory.max").write_text("1000\n")
    assert available() == 300
    monkeypatch.setattr(rooms, "MEMORY", tmp_path / "nothing")
    assert available() is None
    pipe = SimpleNamespace()
    with room(pipe, 64, 64, "cpu"):  # with unknown memory nothing is refused
        pass
