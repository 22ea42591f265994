"""How a Ray cluster is joined, and how many CPUs and GPUs each of its workers gets."""

from types import SimpleNamespace

import pytest

from fastdiff import workers
from fastdiff.errors import UserError
from fastdiff.workers import Workers, join, workers_of

EIGHT, TWO = {"CPU": 8.0}, {"CPU": 32.0, "GPU": 2.0}
SHARES = [
    ((EIGHT, "local", None, None, None), Workers(8, 0.0, 1), {"num_cpus": 1}),
    ((EIGHT, "local", None, 2, None), Workers(2, 0.0, 4), {"num_cpus": 4}),
    ((EIGHT, "local", None, 3, None), Workers(3, 0.0, 2), {"num_cpus": 2}),
    # a cluster may be two machines with four CPUs each, on which a worker with eight cannot start
    ((EIGHT, "auto", None, 1, None), Workers(1, 0.0, 1), {"num_cpus": 1}),
    ((TWO, "local", None, None, None), Workers(2, 1.0, 1), {"num_gpus": 1.0}),
    ((TWO, "local", "cuda", 3, 0.5), Workers(3, 0.5, 1), {"num_gpus": 0.5}),
    ((TWO, "local", "cpu", 4, None), Workers(4, 0.0, 8), {"num_cpus": 8}),
]
REFUSED = {
    "--workers is 9, each with a CPU, and .* for 8": (EIGHT, "auto", None, 9, None),
    "--workers is 3, each with 1 GPUs, and .* for 2": (TWO, "auto", None, 3, None),
    "--gpus-per-worker is 1.5; give a whole number": (TWO, "auto", None, None, 1.5),
    "--device is cuda, and each worker has 0 GPUs": (EIGHT, "local", "cuda", None, None),
    "--device is cuda:1, and each worker has 1 GPUs": (TWO, "local", "cuda:1", None, None),
}


@pytest.mark.parametrize(("asked", "want", "needs"), SHARES)
def test_resources_of_each_worker(asked, want, needs):
    found = workers_of(*asked)
    assert (found, found.needs) == (want, needs)
    assert found.device == ("cuda" if "num_gpus" in needs else "cpu")


@pytest.mark.parametrize("message", REFUSED)
def test_requests_beyond_the_cluster_are_refused(message):
    with pytest.raises(UserError, match=message):
        workers_of(*REFUSED[message])


@pytest.mark.parametrize(
    ("address", "raised", "told"),
    [
        (
            "local",
            Exception("The current node timed out during startup. This could\nhappen"),
            r"--ray local: Ray did not start within 31 s \(The current node timed out during"
            r" startup. This could\); run the command again when the machine is less busy, or",
        ),
        (
            "auto",
            ConnectionError("Could not find any running Ray instance."),
            r"--ray auto: no Ray answers there \(Could not .* instance.\); give local, auto, or",
        ),
    ],
)
def test_a_ray_that_does_not_start_or_answer_is_told_apart(monkeypatch, address, raised, told):
    now = [100.0]
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def init(address, **_):
        now[0] += 31.2
        raise raised

    with pytest.raises(UserError, match=told):
        join(SimpleNamespace(init=init), address)
