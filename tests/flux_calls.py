"""One call of FLUX's pipelines, as the tests of several files make it."""

import torch

SIZE = {"height": 16, "width": 12, "max_sequence_length": 9}


def draw(pipe, **options):
    """What the call returns: latents, unless the options say otherwise."""
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt": "red heart", "num_inference_steps": 3, "output_type": "latent"}
    given["generator"] = torch.Generator().manual_seed(5)
    return pipe(**given | SIZE | options).images
