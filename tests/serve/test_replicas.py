"""Replicas on a local Ray; they take minutes and gigabytes, so they run only with -m slow."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from served import client_of, close, shown

from benchmarks import clients
from benchmarks.clients import ask, settled

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """The process of `fastdiff serve` and its port."""
    options = ("--ray", "local", "--workers", "2", "--capacity", "2", "--queue", "20")
    with clients.server(*options) as (process, port):
        yield process, port


def picture(answer):
    return answer.told["data"][0]["b64_json"]


def replicas(process):
    """The replicas' processes."""
    own = psutil.Process(process.pid).children(recursive=True)
    return [one for one in own if "ServeReplica:fastdiff" in " ".join(one.cmdline())]


def test_a_replica_draws_the_same(cluster, demo):
    _, port = cluster
    answer = client_of(port).images.generate(prompt="sun", n=2, extra_body={"seed": 8, "steps": 4})
    for one in answer.data:
        generator = torch.Generator().manual_seed(one.seed)
        options = {"num_inference_steps": 4, "guidance_scale": 4.0, "generator": generator}
        want = copy.deepcopy(demo)("sun", **options).images[0]
        assert close(one.b64_json, want)


def test_bad_requests_are_one_sentence(cluster):
    _, port = cluster
    for asked, sentence in (
        ({"size": "70x64"}, "width is 70; this pipeline needs a positive multiple of 8"),
        ({"scheduler": "../x"}, "scheduler is '../x'; a StableDiffusionPipeline"),
    ):
        for stream in (False, True):
            answer = ask(port, {"prompt": "a", "stream": stream} | asked)
            assert answer.status == 400
            assert answer.sentence.startswith(sentence)


def worked(process):
    """CPU seconds that the replicas have used, once they are idle."""
    before, now = -1.0, 0.0
    while now - before > 0.1:
        time.sleep(2)
        before, now = now, sum(sum(one.cpu_times()[:2]) for one in replicas(process))
    return now


def test_a_request_whose_client_disconnects_is_ended(cluster):
    """The replica stops drawing, too."""
    process, port = cluster
    body = {"prompt": "a", "steps": 100, "n": 4}
    begun = worked(process)
    assert ask(port, body).status == 200
    whole = worked(process)
    with pytest.raises(TimeoutError):
        ask(port, body, timeout=0.3)
    assert worked(process) - whole < 0.5 * (whole - begun)
    assert clients.answered(settled(port))[499] == 1


def test_a_killed_replica_leaves_no_request_unanswered(cluster):
    """kill -9 during twelve requests: each gets a picture or a 503, and later ones a picture."""
    process, port = cluster
    body = {"prompt": "dog face", "seed": 4, "steps": 60}
    alone = shown(picture(ask(port, body)))
    with ThreadPoolExecutor(12) as pool:
        running = [pool.submit(ask, port, body) for _ in range(12)]
        while clients.measured(port)["fastdiff_drawing"] < 1:
            time.sleep(0.02)
        killed = replicas(process)[0]
        killed.kill()
        answers = [one.result(timeout=300) for one in running]
    assert {one.status for one in answers} <= {200, 503}
    drawn = [picture(one) for one in answers if one.status == 200]
    assert drawn, "the other replica draws them"
    assert all(close(one, alone) for one in [*drawn, picture(ask(port, body))])
    assert killed.pid not in {one.pid for one in replicas(process)}


def test_sigterm_lets_accepted_requests_finish(cluster):
    """This is the last test of the file: it ends the server and its cluster."""
    process, port = cluster
    left = psutil.Process(process.pid).children(recursive=True)
    ended = clients.ended_amid(port, 5, 100, process.terminate)
    assert (ended.accepted, ended.later.status) == ([200] * 5, 503)
    assert process.wait(60) == 0
    _, alive = psutil.wait_procs(left, timeout=60)
    assert alive == []
