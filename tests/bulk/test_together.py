"""`fastdiff generate` under torchrun: two ranks draw one picture, or the rows of a file."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from command import environment
from forked import DOCS, commands, write_prompts
from PIL import Image

TORCHRUN = ["torchrun", "--nproc-per-node", "2", "-m", "fastdiff"]
RANKS = """
os.chdir(sys.argv[1])
sys.exit(max(in_ranks(lambda rank: main(sys.argv[2:]), joins=False)))
"""
ALONE = """
os.chdir(sys.argv[1])
main(sys.argv[2:])
"""
PYTHON = """
os.chdir(sys.argv[1])
fastdiff.load_demo = lambda: pipe
sys.exit(max(in_ranks(lambda rank: exec(sys.argv[2], {}), joins=False)))
"""


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


# starts four processes; compiler/test_ranks.py has two ranks
@pytest.mark.product
def test_the_commands_of_the_parallel_page_draw_as_one_process_does(forked, tmp_path):
    """The pictures differ by at most one level of 8 bits; only the first rank writes and prints."""
    guided, divided = commands("parallel.md")
    write_prompts(tmp_path)
    for line, made in ((guided, "heart.png"), (divided, "pictures")):
        assert line[: len(TORCHRUN)] == TORCHRUN
        arguments, place = line[len(TORCHRUN) :], tmp_path / made
        code, out, err = forked(ALONE, str(tmp_path), *arguments)
        assert code == 0, err
        place.rename(tmp_path / f"alone {made}")
        code, shared, err = forked(RANKS, str(tmp_path), *arguments)
        assert code == 0, err
        assert shared == out, "only one rank prints"
    assert (
        np.abs(picture(tmp_path / "heart.png") - picture(tmp_path / "alone heart.png")).max() <= 1
    )
    alone = tmp_path / "alone pictures"
    names = sorted(path.name for path in alone.iterdir())
    assert names == [".lock", "1.png", "2.png", "job.json", "manifest.jsonl"]
    for name in names:
        assert (tmp_path / "pictures" / name).read_bytes() == (alone / name).read_bytes(), name
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "parallel.md").read_text(), re.S)
    (tmp_path / "heart.png").unlink()
    code, _, err = forked(PYTHON, str(tmp_path), block)
    assert code == 0, err
    assert (tmp_path / "heart.png").exists()


def test_a_rank_that_dies_ends_the_job(forked, tmp_path):
    """The rank dies while it draws rows of a file."""
    write_prompts(tmp_path)
    line = commands("parallel.md")[1][len(TORCHRUN) :]
    dies = """
own = fastdiff.bulk.painter.Painter.attempt
def attempt(self, row):
    if os.environ.get("RANK") == "1":
        os._exit(9)
    return own(self, row)
fastdiff.bulk.painter.Painter.attempt = attempt
"""
    code, _, err = forked(dies + RANKS, str(tmp_path), *line)
    assert code == 9
    assert "rank 0 of 2 no longer hears from the others: one of them ended" in err


@pytest.mark.slow  # two processes import everything anew, which `forked` avoids above
def test_torchrun_itself_runs_the_commands(tmp_path):
    write_prompts(tmp_path)
    torchrun = shutil.which("torchrun") or [sys.executable, "-m", "torch.distributed.run"]
    for line in commands("parallel.md"):
        given = [*([torchrun] if isinstance(torchrun, str) else torchrun), *line[1:]]
        done = subprocess.run(given, cwd=tmp_path, env=environment(), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "heart.png").exists()
    assert (tmp_path / "pictures/manifest.jsonl").exists()
