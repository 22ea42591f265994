"""A page that draws: pip install gradio && python examples/gradio_demo.py [FOLDER OF A PIPELINE]"""

import sys
import time

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image

import fastdiff

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
if len(sys.argv) > 1:
    pipe = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=DTYPE).to(DEVICE)
else:
    pipe = fastdiff.load_demo(DTYPE, DEVICE)
fastdiff.compile(pipe)


def draw(prompt: str, seed: float, steps: float) -> tuple[Image, str]:
    """The picture, and what ran fast."""
    generator = torch.Generator().manual_seed(int(seed))
    start = time.perf_counter()
    image = pipe(prompt, num_inference_steps=int(steps), generator=generator).images[0]
    return image, f"{time.perf_counter() - start:.2f} s\n\n{fastdiff.report(pipe)}"


page = gr.Interface(
    draw,
    [gr.Textbox("red heart"), gr.Number(0, label="seed"), gr.Slider(1, 50, 25, step=1)],
    [gr.Image(format="png"), gr.Textbox(label="seconds and report", lines=12)],
    title="fastdiff",
    api_name="draw",
)

if __name__ == "__main__":
    page.queue(default_concurrency_limit=1).launch()
