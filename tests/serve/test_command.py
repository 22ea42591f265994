"""`fastdiff serve` refuses in one sentence what it cannot serve, before it loads anything."""

import socket

import pytest
from command import run

BAD = {
    "--capacity is 0": ("--capacity", "0"),
    "--queue is -1": ("--queue", "-1"),
    "--steps is 0": ("--steps", "0"),
    "--steps is 50, but --max-steps is 40": ("--steps", "50", "--max-steps", "40"),
    "--guidance-scale is nan": ("--guidance-scale", "nan"),
    "--max-pictures is 9, but only 2 may be drawn or wait": (
        *("--max-pictures", "9", "--capacity", "1", "--queue", "1"),
    ),
    "--replicas is 2; it goes with --ray": ("--replicas", "2"),
    "--api-key is empty or has characters": ("--api-key", ""),
    "--host 203.0.113.1 --port 0 cannot be listened on": ("--host", "203.0.113.1"),
    "--port is 70000": ("--port", "70000"),
    "{tmp}/nothing is not a folder": ("{tmp}/nothing",),
    "--device is 'toaster'": ("--device", "toaster"),
    "--scheduler is 'No'": ("--scheduler", "No"),
}


@pytest.mark.parametrize(("message", "arguments"), BAD.items(), ids=list(BAD))
def test_bad_input(tmp_path, message, arguments):
    words = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    code, out, err = run("serve", *words, *([] if "--port" in words else ["--port", "0"]))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message.replace("{tmp}", str(tmp_path)) in err


def test_a_variable_that_is_empty_is_no_key(monkeypatch):
    monkeypatch.setenv("FASTDIFF_API_KEY", "")  # as compose.yaml sets it where there is none
    code, _, err = run("serve", "/nowhere", "--port", "0")
    assert (code, "/nowhere is not a folder" in err) == (2, True)


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, err = run("serve", "--port", port)
    assert code == 2
    assert f"--port {port} cannot be listened on: Address already in use; give another" in err
