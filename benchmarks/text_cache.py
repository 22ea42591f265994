"""How long a text encoder takes, and how long the text cache: `python -m benchmarks.text_cache`.

The text model of Stable Diffusion 1.5 (CLIP ViT-L/14) at its real size with random weights, one
text of 77 tokens, float32 on the CPU: medians of calls in turn, in CPU time of one thread, which a
busy machine changes little.
"""

import time
from statistics import median

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from fastdiff.compiler.text_cache import cache_of, keep_texts

ROUNDS = 15


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"hidden_size": 768, "intermediate_size": 3072}
    depth = {"num_hidden_layers": 12, "num_attention_heads": 12}
    encoder = CLIPTextModel(CLIPTextConfig(**sizes, **depth)).eval()
    ids = torch.randint(49000, (1, 77))
    keep_texts({"text_encoder": encoder}, 1)
    calls = {"the encoder": encoder._call_impl, "a hit": encoder}
    seconds = {name: [] for name in calls}
    with torch.no_grad():
        encoder(ids)
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.thread_time()
                call(ids)
                seconds[name].append(time.thread_time() - start)
    for name, taken in seconds.items():
        print(f"{name:<12} {1e3 * median(taken):8.2f} ms, at best {1e3 * min(taken):.2f} ms")
    print(cache_of(encoder))


if __name__ == "__main__":
    main()
