"""The command `fastdiff serve`: bad arguments are one sentence, and SIGTERM ends it in order."""

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from command import run

from benchmarks.clients import ask, ended_amid
from fastdiff.demo import UNCONDITIONAL_FOLDER

BAD = {
    "--capacity is 0": ("--capacity", "0"),
    "--queue is -1": ("--queue", "-1"),
    "--steps is 0": ("--steps", "0"),
    "--steps is 50, but --max-steps is 40": ("--steps", "50", "--max-steps", "40"),
    "--guidance-scale is nan": ("--guidance-scale", "nan"),
    "--max-pictures is 9, but only 2 can be drawn or wait": (
        *("--max-pictures", "9", "--capacity", "1", "--queue", "1"),
    ),
    "--max-pictures is 9, but only 8 can": (
        *("--max-pictures", "9", "--queue", "0", "--workers", "2"),
    ),
    "--max-pictures is 5, but only 4 can": (
        *("--max-pictures", "5", "--queue", "0", "--ray", "local", "--workers", "1"),
    ),
    "--gpus-per-worker needs --ray": ("--gpus-per-worker", "0.5"),
    "--api-key is empty or has characters": ("--api-key", ""),
    "--host 203.0.113.1 --port 0 cannot be listened on": ("--host", "203.0.113.1"),
    "--port is 70000": ("--port", "70000"),
    "{tmp}/nothing is neither an existing folder": ("{tmp}/nothing",),
    "--device is 'toaster'": ("--device", "toaster"),
    "--scheduler is 'No'": ("--scheduler", "No"),
    "a DDPMPipeline does not draw from text alone": (str(UNCONDITIONAL_FOLDER),),
}


@pytest.mark.parametrize(("message", "arguments"), BAD.items(), ids=list(BAD))
def test_bad_arguments_are_one_sentence(tmp_path, message, arguments):
    words = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    code, out, err = run("serve", *words, *([] if "--port" in words else ["--port", "0"]))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message.replace("{tmp}", str(tmp_path)) in err


def test_an_empty_key_variable_counts_as_no_key(monkeypatch):
    monkeypatch.setenv("FASTDIFF_API_KEY", "")  # as compose.yaml sets it if the user has no key
    code, _, err = run("serve", "/nowhere", "--port", "0")
    assert (code, "/nowhere is neither an existing folder" in err) == (2, True)


def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, err = run("serve", "--port", port)
    assert code == 2
    assert f"--port {port} cannot be listened on: Address already in use; give another" in err


def test_sigterm_lets_accepted_requests_finish():
    """The test sends the signal to this process, in which the server has set its handler."""
    assert threading.current_thread() is threading.main_thread()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def client():
        for _ in range(2000):
            try:
                assert ask(port, path="/readyz").status == 200
                break
            except OSError:  # the server still loads the pipeline
                time.sleep(0.05)
        sent = []

        def end():
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

        try:
            return ended_amid(port, 5, 40, end)
        finally:
            if not sent:  # the requests failed: without a signal the server runs for ever
                end()

    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(client)
        code, out, err = run(
            "serve", "--port", port, "--queue", "5", "--capacity", "1", "--workers", "2"
        )
    ended = seen.result()
    assert ended.accepted == [200] * 5
    assert (ended.later.status, ended.later.told["error"]["code"]) == (503, "draining")
    assert int(ended.later.headers["retry-after"]) >= 1
    said = [f"fastdiff: demo at http://127.0.0.1:{port}", "fastdiff: finishing what was accepted"]
    assert (code, out, err.splitlines()) == (0, "", said)
