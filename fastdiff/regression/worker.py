"""Runs in the interpreter of either state and times what it is asked to: `python -P worker.py`.

This file and its suites, `suite_pipelines` and `suite_kernels`, are the driver's, not the state's.
From the state they import only what users import, what `bench` has had since its first release and,
to draw a pipeline that it could not draw then, what it draws with. It reads a line of JSON and
answers with one:

    {"suite": …, …}           the settings, once         -> {"versions": …}
    {"do": "start"}           fork a new process         -> {"groups": [[row, …], …], …}
    {"do": "run", "group": i} time the group's rows      -> {"ms": {row: milliseconds}}
    {"do": "check"}           are the results right?     -> {"wrong": {row: why}}
    {"do": "count"}           count what does not vary   -> {"counts": {name: [value, unit]}}
    {"do": "stop"}            end that process           -> {}

Everything is imported before the first fork, so that a new process only pays for its preparation.
Nothing is computed before it, since neither CUDA nor a thread pool survives a fork.
"""

import gc
import json
import os
import runpy
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    settings = _read()
    import torch

    if settings["device"] == "cpu":
        torch.set_num_threads(settings["threads"])
    file = Path(__file__).with_name(f"suite_{settings['suite']}.py")
    suite = runpy.run_path(str(file))["Suite"](settings)  # not the state's, which may be another
    answer({"versions": _versions(settings["packages"])})
    gc.collect()
    gc.freeze()
    while _read():  # "start"
        child = os.fork()
        if child == 0:
            try:
                _serve(suite, answer)
            except BaseException as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                answer({"error": f"{type(error).__name__}: {reason}"})
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            answer({"error": f"its process was ended by signal {status & 127}"})
            return


def _serve(suite: Any, answer: Any) -> None:
    """Answer requests in a new process until one says to stop."""
    answer(suite.start())
    gc.collect()
    gc.freeze()
    gc.disable()
    while True:
        asked = _read()
        match asked.get("do"):
            case "run":
                times = suite.run(asked["group"])
                gc.collect()  # not while timing
                answer({"ms": times})
            case "check":
                answer({"wrong": suite.check()})
            case "count":
                answer({"counts": suite.count()})
            case _:
                answer({})
                return


def _read() -> dict[str, Any]:
    """The next line, {} at the end; byte by byte, since parent and child read the same pipe."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return {}
        line += byte
    read: dict[str, Any] = json.loads(line)
    return read


def _versions(packages: list[str]) -> dict[str, str | None]:
    from importlib import metadata

    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    with suppress(ModuleNotFoundError):  # a state without fastdiff runs eagerly
        found["fastdiff._C"] = "built" if find_spec("fastdiff._C") else None
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    main()
