"""How the workers of a Ray cluster share it, as its numbers say."""

import pytest

from fastdiff.errors import UserError
from fastdiff.workers import Workers, workers_of

EIGHT, TWO = {"CPU": 8.0}, {"CPU": 32.0, "GPU": 2.0}
SHARES = [
    ((EIGHT, "local", None, None, None), Workers(8, 0.0, 1), {"num_cpus": 1}),
    ((EIGHT, "local", None, 2, None), Workers(2, 0.0, 4), {"num_cpus": 4}),
    ((EIGHT, "local", None, 3, None), Workers(3, 0.0, 2), {"num_cpus": 2}),
    # two machines of four: a worker of eight would start on none
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
def test_what_each_worker_has(asked, want, needs):
    found = workers_of(*asked)
    assert (found, found.needs) == (want, needs)
    assert found.device == ("cuda" if "num_gpus" in needs else "cpu")


@pytest.mark.parametrize("told", REFUSED)
def test_what_the_cluster_has_no_room_for(told):
    with pytest.raises(UserError, match=told):
        workers_of(*REFUSED[told])
