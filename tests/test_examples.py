"""The scripts of examples/ run and draw the right pictures."""

import importlib.util
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from command import environment
from PIL import Image

import fastdiff

EXAMPLES = Path(__file__).parent.parent / "examples"


# starts two processes; compiler/test_ranks.py divides a batch
@pytest.mark.product
def test_data_parallel_divides_the_prompts_between_two_processes(demo, tmp_path):
    """Two processes with accelerate, over gloo, draw what a single one draws."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    shared |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, EXAMPLES / "data_parallel.py", tmp_path]
    running = [
        subprocess.Popen(
            script,
            env=environment() | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    (first, _), (second, _) = outputs
    assert second == "", "only the first process reports"
    assert re.search("^unet +fastdiff +16 calls", first, re.M), "8 steps of half the prompts"
    assert re.search("^loop +fastdiff +2 loops$", first, re.M)
    for i, prompt in enumerate(("red heart", "dog face", "purple car", "sunflower")):
        generator = torch.Generator().manual_seed(i)
        want = demo(prompt, num_inference_steps=8, generator=generator).images[0]
        got = Image.open(tmp_path / f"{i}.png")
        assert np.abs(np.asarray(got, dtype=int) - np.asarray(want, dtype=int)).max() <= 1


class Page:
    """A stand-in for gradio's Interface, which needs a server and many packages."""

    def __init__(self, draw, inputs, outputs, **options):
        self.draw, self.inputs, self.outputs = draw, inputs, outputs


def test_the_gradio_page_draws_and_shows_the_report(demo, monkeypatch):
    gradio = ModuleType("gradio")
    gradio.Interface = Page
    for name in ("Textbox", "Number", "Slider", "Image"):
        setattr(gradio, name, lambda value=None, *rest, **options: value)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setattr(sys, "argv", ["gradio_demo.py"])
    path = EXAMPLES / "gradio_demo.py"
    assert len(path.read_text().splitlines()) <= 40
    spec = importlib.util.spec_from_file_location("gradio_demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.page
    image, report = page.draw(*page.inputs[:2], 4)
    want = demo("red heart", num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    difference = np.asarray(image, dtype=int) - np.asarray(want.images[0], dtype=int)
    assert np.abs(difference).max() <= 1
    assert str(fastdiff.report(module.pipe)) in report
    assert len(page.outputs) == 2
