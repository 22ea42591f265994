"""Draw prompts on all GPUs at once with accelerate: every process has a compiled pipeline.

accelerate launch --num_processes 2 examples/data_parallel.py pictures
torchrun --nproc-per-node 2 examples/data_parallel.py pictures  # without a GPU
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

import fastdiff

PROMPTS = ["red heart", "dog face", "purple car", "sunflower"]


def main(out: Path) -> None:
    gpu = torch.cuda.is_available()
    state, dtype = PartialState(cpu=not gpu), torch.float16 if gpu else torch.float32
    # your own: StableDiffusionPipeline.from_pretrained(...).to(state.device)
    pipe = fastdiff.load_demo(dtype, state.device)
    pipe.set_progress_bar_config(disable=not state.is_main_process)
    fastdiff.compile(pipe)  # after .to(): each process compiles the copy on its own device
    out.mkdir(parents=True, exist_ok=True)
    with state.split_between_processes(list(enumerate(PROMPTS))) as mine:
        for i, prompt in mine:
            generator = torch.Generator().manual_seed(i)  # the picture is the same on any process
            image = pipe(prompt, num_inference_steps=8, generator=generator).images[0]
            image.save(out / f"{i}.png")
    state.wait_for_everyone()
    state.print(fastdiff.report(pipe))  # of the first process
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
