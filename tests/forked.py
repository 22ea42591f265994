"""Runs programs in forks of one process that has loaded the demo, for tests that kill a process or
start several ranks."""

import re
import shlex
from pathlib import Path

import pytest
from command import copied

DOCS = Path(__file__).parent.parent / "docs"

BEGIN = '''
import contextlib, io, signal, socket, tempfile, threading, time
import numpy as np
import torch
import tqdm.std
# tqdm's own lock is one for this process and all copies: a copy that is killed while it holds it
# would stop the others for ever
tqdm.std.tqdm.set_lock(threading.RLock())
tqdm.std.tqdm.monitor_interval = 0
import torch.distributed as dist
import diffusers
import fastdiff.bulk.job, fastdiff.bulk.painter, fastdiff.cli.bulk, fastdiff.demo
from fastdiff.cli import main
from fastdiff.errors import UserError
from fastdiff.runtime import ranks

def free():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]

def in_ranks(program, count=2, seconds=20, joins=True):
    """Run program(rank) in a fork of this process for each rank, as torchrun does; return the exit
    codes. joins: whether the ranks join each other first."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free())}
    os.environ["WORLD_SIZE"] = str(count)
    children = []
    for rank in range(count):
        if not (child := os.fork()):
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
            code = 1
            try:
                ranks.TIMEOUT = ranks.timedelta(seconds=seconds)
                if joins:
                    ranks.joined("cpu")
                program(rank)
                code = 0
            except UserError as error:
                print(json.dumps([rank, str(error)]))
                code = 2
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

pipe = fastdiff.demo.load_demo()
pipe.set_progress_bar_config(disable=True)
fastdiff.bulk.painter.opened = lambda *_: pipe  # loaded once for all copies
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    with open(f"{folder}/x.txt", "w") as file:
        file.write("sun")
    words = ["generate", "--prompts", file.name, "--out", f"{folder}/x", "--steps", "1"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        main(words)  # what it imports is imported for all copies
fastdiff.restore(pipe)
'''


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """run(code, *arguments): exit code, stdout and stderr of a program that begins with `BEGIN`."""
    with copied(BEGIN, tmp_path_factory.mktemp("copies")) as run:
        yield run


def commands(page: str) -> list[list[str]]:
    """The commands of a docs page."""
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(), re.S)
    return [shlex.split(line) for line in "".join(blocks).splitlines()]


def write_prompts(folder: Path) -> None:
    """The file of prompts that docs/bulk.md shows."""
    text = re.search(r"```csv\n(.*?)```", (DOCS / "bulk.md").read_text(), re.S)[1]
    (folder / "prompts.csv").write_text(text)
