"""How many CPUs and GPUs each worker of a Ray cluster gets."""

import pytest

from fastdiff.errors import UserError
from fastdiff.workers import Workers, workers_of

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
