"""docs/serve.md matches the code: its requests run, its tables name the real fields and metrics."""

import copy
import re
import subprocess
from pathlib import Path

from PIL import Image
from served import Held, served

import fastdiff
from benchmarks.clients import ask, measured
from fastdiff.serve.asked import Asked
from fastdiff.serve.painter import Painter

PAGE = (Path(__file__).parents[2] / "docs/serve.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def test_the_pages_requests_run(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    painter = Painter(fastdiff.compile(copy.deepcopy(demo)), 2, steps=3)
    with served(painter) as port:
        here = f"127.0.0.1:{port}"
        said = []
        for block in blocks("sh"):
            if "curl" in block:
                script = f"set -e\n{block.replace('127.0.0.1:8000', here)}\nwait"
                done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
                said.append(done.stdout)
        (python,) = blocks("python")
        exec(python.replace("127.0.0.1:8000", here), {})
    painter.close()
    drawn, streamed, cancelled, watched = said
    assert '"seed":3' in drawn
    events = re.findall(r"^event: (.*)$", streamed, re.M)
    last = ["fastdiff.progress", "image_generation.completed"]
    assert (len(events), events[-2:]) == (10, last)
    assert "image_generation.partial_image" in events
    assert '"deleted":true' in cancelled or '"not_found"' in cancelled, "or not begun yet"
    assert watched.startswith('{"status":"ok"}{"status":"ok"}# HELP')
    assert [Image.open(f"car-{number}.png").size for number in (0, 1)] == [(64, 64)] * 2


def test_the_pages_tables_name_the_fields_and_metrics():
    fields = re.findall(r"^\| (`[a-z_`, ]+`) \| ", PAGE, re.M)
    named = [name for row in fields for name in re.findall(r"`(\w+)`", row)]
    assert set(Asked.model_fields) <= set(named)
    with served(Held()) as port:
        ask(port, {"prompt": ""})
        served_names = [n for n in measured(port) if re.match(r"fastdiff_(?!.*_created)", n)]
    ours = {re.sub(r"(_bucket|_count|_sum)?({.*)?$", "", name) for name in served_names}
    assert ours == set(re.findall(r"`(fastdiff_\w+)[`{]", PAGE))
