"""Peak bytes against allocations counted by hand."""

from types import SimpleNamespace

import torch

from fastdiff.bench.memory import baseline, peak_bytes

MIB = 2**20
CPU = torch.device("cpu")


def block(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8)


def test_weights_packed_copies_and_the_peak_of_temporaries():
    net = torch.nn.Linear(MIB // 4, 3, bias=False)  # 3 MiB, there before the baseline
    pipe = SimpleNamespace(components={"unet": net, "tokenizer": object()}, device=CPU)
    unrelated = block(64)
    before = baseline(CPU)
    packed = block(2)
    views = [packed[: MIB // 2], packed[MIB // 2 :]]  # one storage, counted once

    def draw():
        first = block(10)
        second = block(5)
        del first, second
        block(12)

    assert peak_bytes(pipe, before, draw) == (3 + 2 + 15) * MIB
    assert len(views) == 2
    assert unrelated.numel() == 64 * MIB
