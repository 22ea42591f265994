"""The server with real clients: OpenAI's library, plain sockets, clients that disconnect."""

import copy
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import command
import openai
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from prometheus_client.parser import text_string_to_metric_families
from served import Held, client_of, close, served, shown

import fastdiff
from benchmarks import clients
from benchmarks.bad_requests import LATE, bad_requests, late, refusal_of
from benchmarks.clients import DRAW, ask, settled
from benchmarks.serve import load
from fastdiff.serve.painter import Painter


@pytest.fixture(scope="module")
def port(demo):
    """The port of a server of the demo pipeline."""
    painter = Painter(fastdiff.compile(copy.deepcopy(demo)), 2, steps=3)
    with served(painter) as port:
        yield port
    painter.close()


def test_openais_client_draws(demo, port):
    client = client_of(port)
    assert [model.id for model in client.models.list()] == ["demo"]
    own = {"seed": 3, "steps": 4, "guidance_scale": 3.0, "negative_prompt": "sun"}
    own |= {"scheduler": "EulerDiscreteScheduler"}
    answer = client.images.generate(
        prompt="purple car", model="demo", n=2, size="72x64", extra_body=own
    )
    eager = copy.deepcopy(demo)
    eager.scheduler = EulerDiscreteScheduler.from_config(eager.scheduler.config)
    assert [one.seed for one in answer.data] == [3, 4]
    for one in answer.data:
        want = eager(
            "purple car",
            negative_prompt="sun",
            num_inference_steps=4,
            guidance_scale=3.0,
            width=72,
            height=64,
            generator=torch.Generator().manual_seed(one.seed),
        ).images[0]
        assert close(one.b64_json, want)


def test_openais_client_receives_partial_pictures(demo, port):
    """Partial pictures are the latents between steps, decoded by the pipeline's own VAE."""
    latents = {}

    def keep(pipe, step, timestep, given):
        latents[step + 1] = given["latents"]
        return {}

    generator = torch.Generator().manual_seed(5)
    own = {"num_inference_steps": 6, "generator": generator, "callback_on_step_end": keep}
    want = demo("sunflower", **own).images[0]
    stream = client_of(port).images.generate(
        prompt="sunflower", stream=True, partial_images=2, extra_body={"seed": 5, "steps": 6}
    )
    *partial, last = stream
    assert last.type == "image_generation.completed"
    assert close(last.b64_json, want)
    assert [one.partial_image_index for one in partial] == [0, 1]
    for one, step in zip(partial, (2, 4), strict=True):
        assert one.type == "image_generation.partial_image"
        with torch.no_grad():
            decoded = demo.vae.decode(latents[step] / demo.vae.config.scaling_factor).sample
        assert close(one.b64_json, demo.image_processor.postprocess(decoded)[0])


def test_a_request_without_options_uses_the_servers_defaults(demo, port):
    first, second = (ask(port, {"prompt": "dog face", "n": None}).told["data"] for _ in "ab")
    assert first[0]["seed"] != second[0]["seed"], "without a seed each picture differs"
    again = ask(port, {"prompt": "dog face", "seed": first[0]["seed"], "size": "auto"})
    want = shown(first[0]["b64_json"])
    assert want.shape == (64, 64, 3)
    assert close(again.told["data"][0]["b64_json"], want)


def test_progress_is_streamed_on_request(port):
    asked = {"prompt": "sun", "stream": True, "progress": True}
    answer = ask(port, asked, headers={"X-Request-Id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    events = re.findall(r"event: (.+)\ndata: (.+)\n\n", answer.body.decode())
    documents = [json.loads(data) for _, data in events]
    assert [one["type"] for one in documents] == [kind for kind, _ in events]
    steps = [(one["step"], one["steps"]) for one in documents[:-1]]
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert documents[-1]["type"] == "image_generation.completed"


def test_bad_requests_get_one_sentence_each_and_disturb_no_other(port):
    """Good requests are drawn at the same time, and the metrics count all requests."""
    before = clients.answered(settled(port))
    bad = list(bad_requests())
    assert len(bad) >= 300
    with ThreadPoolExecutor(2) as pool:
        good = [pool.submit(ask, port, {"prompt": "a", "seed": 1, "steps": 9}) for _ in range(4)]
        sentences = [refusal_of(port, one) for one in bad]
        first, *others = (one.result().told["data"][0]["b64_json"] for one in good)
    assert all(close(other, shown(first)) for other in others), "bad requests change no picture"
    assert not [x for x in sentences if re.search(r"Traceback|fastdiff/|Error\b|File \"", x)]
    counted = clients.answered(settled(port)) - before
    routed = sum(clients.answered(settled(port), route).total() for route in (DRAW, "other"))
    assert counted[200] == 4
    assert counted.total() <= len(bad) + 4 <= routed


@pytest.mark.parametrize("sent", LATE, ids=range(len(LATE)))
def test_slow_clients_get_a_408(sent):
    with served(Held(), patience=0.2) as port:
        answer = late(port, sent)
        assert answer.status == 408
        assert "did not arrive in 0.2 s" in answer.sentence
        assert ask(port, path="/healthz").status == 200


def until(holds, *running):
    """Wait until it holds; raise the error of a running request, or fail if one ends too early."""

    def holds_now():
        if not (held := holds()):
            ended = [one.result() for one in running if one.done()]
            assert not ended, f"answered too early: {ended}"
        return held

    command.until(holds_now)


def test_a_full_queue_refuses_requests_until_there_is_room():
    engine = Held()
    with served(engine, queue=1) as port, ThreadPoolExecutor(2) as pool:
        asked = {"prompt": "a"}
        running = [pool.submit(ask, port, asked) for _ in range(2)]
        until(lambda: len(engine.begun) == 2, *running)
        with pytest.raises(
            openai.RateLimitError, match="2 of at most 2 pictures are being drawn or wait"
        ) as caught:
            client_of(port).images.generate(prompt="b")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        metrics = clients.measured(port)
        assert metrics["fastdiff_places"] == 1
        assert metrics["fastdiff_drawing"] == 2
        engine.go.set()
        assert [one.result().status for one in running] == [200, 200]
        assert ask(port, asked).status == 200
        metrics = settled(port)
        assert clients.answered(metrics) == {200: 3, 429: 1}
        assert metrics["fastdiff_pictures_total"] == metrics["fastdiff_request_seconds_count"] == 3
        assert metrics["fastdiff_steps_total"] == 6
        text = ask(port, path="/metrics").body.decode()
        assert len(list(text_string_to_metric_families(text))) > 8


def gone(port, **asked):
    """Send a request and return the function that disconnects the client."""
    connection = HTTPConnection("127.0.0.1", port)
    body = json.dumps({"prompt": "gone"} | asked)
    connection.request("POST", DRAW, body, {"Content-Type": "application/json"})
    return connection.close


@pytest.mark.parametrize("asked", [{}, {"n": 2}, {"stream": True}], ids=str)
def test_a_request_whose_client_disconnects_is_ended(asked):
    engine = Held()
    with served(engine) as port:
        leave = gone(port, **asked)
        until(lambda: engine.begun)
        leave()
        until(lambda: engine.ended)
        until(lambda: clients.answered(clients.measured(port)))
        assert clients.answered(settled(port)) == {499: 1}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_cancelled_by_its_id(stream):
    engine = Held()
    with served(engine) as port, ThreadPoolExecutor(1) as pool:
        name = {"X-Request-Id": "one"}
        running = pool.submit(ask, port, {"prompt": "a", "stream": stream}, headers=name)
        until(lambda: engine.begun, running)
        twice = ask(port, {"prompt": "a"}, headers=name)
        assert (twice.status, "is being drawn" in twice.sentence) == (409, True)
        cancelled = ask(port, path=f"{DRAW}/one", method="DELETE")
        assert cancelled.told == {"id": "one", "object": "image.generation", "deleted": True}
        answer = running.result()
        assert "the request was cancelled" in answer.body.decode()
        assert answer.status == (200 if stream else 410)
        assert engine.ended == ["a"]
        assert ask(port, path=f"{DRAW}/one", method="DELETE").status == 404
        assert clients.answered(settled(port))[410] == 1


class Failing(Held):
    """An engine that fails in the middle of the picture whose prompt is "fails"."""

    async def draw(self, drawing):
        async for event in super().draw(drawing):
            if drawing.prompt == "fails" and self.go.is_set():
                raise RuntimeError("out of luck\nat line 3")
            yield event


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_ends_only_its_own_request(stream):
    engine = Failing()
    with served(engine) as port, ThreadPoolExecutor(2) as pool:
        other = pool.submit(ask, port, {"prompt": "a"})
        wrong = pool.submit(
            client_of(port).images.generate, prompt="fails", stream=True if stream else None
        )
        until(lambda: len(engine.begun) == 2, other, wrong)
        engine.go.set()
        kind = openai.APIError if stream else openai.InternalServerError
        logged = pytest.warns(RuntimeWarning, match="a request failed")
        with logged, pytest.raises(kind, match="drawing failed: out of luck"):
            list(wrong.result())
        assert other.result().status == 200
        assert clients.answered(settled(port)) == {200: 1, 500: 1}


def test_the_key_is_required_for_pictures_and_models_only():
    with served(Held(), key="sesame") as port:
        for key in ("none", "sesam", "Sesame"):
            with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                client_of(port, key).images.generate(prompt="a")
        for method, path in (("POST", DRAW), ("DELETE", f"{DRAW}/a"), ("GET", "/v1/models")):
            assert ask(port, b"{", path=path, method=method).status == 401
        assert client_of(port, "sesame").models.list().data[0].id == "demo"
        for path in ("/", "/healthz", "/readyz", "/metrics"):
            assert ask(port, path=path).status == 200


def test_every_request_of_a_load_is_answered_and_counted(port):
    """Clients stream, ask for two pictures and disconnect; the only error they get is 429."""
    before = clients.answered(settled(port))
    seen = load(port, 6, 0.5, os.getpid())
    counted = clients.answered(settled(port)) - before
    assert set(seen.answers) <= {200, 429, 499}
    assert counted.total() == seen.answers.total()
