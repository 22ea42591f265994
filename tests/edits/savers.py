"""All the ways in which weights are saved, copied and loaded."""

import copy
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import save as accelerate_save
from diffusers.training_utils import EMAModel
from huggingface_hub import save_torch_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from edits.table import Edit, add, edit
from edits.twins import Twin
from edits.weights import adapter


def files(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder."""
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def in_files(write: Callable[[Any, Path], Any]) -> Callable[[Any], dict[str, Tensor]]:
    """A saver that reads back the files that `write(pipe, folder)` writes."""

    def save(pipe: Any) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            write(pipe, Path(folder))
            return files(Path(folder))

    return save


def torch_saved(thing: Callable[[Any], Any]) -> Callable[[Any], dict[str, Tensor]]:
    """A saver that reads back what `torch.save` writes of `thing(pipe)`."""

    def save(pipe: Any) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            torch.save(thing(pipe), Path(folder) / "all.pt")
            loaded = torch.load(Path(folder) / "all.pt", weights_only=False)
        return dict(loaded.state_dict() if isinstance(loaded, nn.Module) else loaded)

    return save


def prepared(pipe: Any, folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare_model(pipe.unet, evaluation_mode=True)
    accelerator.save_state(str(folder))


def averaged(pipe: Any) -> dict[str, Tensor]:
    ema = EMAModel(pipe.unet.parameters(), decay=0.5)
    ema.step(pipe.unet.parameters())
    return {str(at): tensor for at, tensor in enumerate(ema.shadow_params)}


def of_adapter(pipe: Any) -> dict[str, Tensor]:
    adapter(pipe, "one")
    return dict(get_peft_model_state_dict(pipe.unet, adapter_name="one"))


SAVERS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "save_file": in_files(lambda pipe, to: save_file(pipe.unet.state_dict(), to / "a.safetensors")),
    "save_model": in_files(lambda pipe, to: save_model(pipe.unet, str(to / "a.safetensors"))),
    "save_model of the VAE": in_files(
        lambda pipe, to: save_model(pipe.vae, str(to / "a.safetensors"))
    ),
    "accelerate's save_model": in_files(
        lambda pipe, to: Accelerator(cpu=True).save_model(pipe.unet, str(to))
    ),
    "accelerate's save": in_files(
        lambda pipe, to: accelerate_save(
            pipe.vae.state_dict(), str(to / "a.safetensors"), safe_serialization=True
        )
    ),
    "accelerate's save_state": in_files(prepared),
    "save_torch_model": in_files(lambda pipe, to: save_torch_model(pipe.unet, to)),
    "save_pretrained": in_files(lambda pipe, to: pipe.save_pretrained(to)),
    "save_pretrained of the U-Net": in_files(lambda pipe, to: pipe.unet.save_pretrained(to)),
    "torch.save of a module": torch_saved(lambda pipe: pipe.unet),
    "torch.save of a state": torch_saved(lambda pipe: pipe.vae.state_dict()),
    "pickle": lambda pipe: dict(pickle.loads(pickle.dumps(pipe.unet)).state_dict()),
    "deepcopy": lambda pipe: dict(copy.deepcopy(pipe.unet).state_dict()),
    "numpy": lambda pipe: {
        name: torch.from_numpy(weight.numpy().copy())
        for name, weight in pipe.unet.state_dict().items()
    },
    "EMA": averaged,
    "adapter's state": of_adapter,
}
for _name, _save in SAVERS.items():
    add(
        Edit(
            "saver",
            _name,
            lambda twin, save=_save: twin.saved.append(save(twin.pipe)),
        )
    )


def goes_on(copied: Callable[[Any], Any]) -> Callable[[Twin], None]:
    """Continue with a copy of the pipeline; copies are eager until compiled."""

    def apply(twin: Twin) -> None:
        twin.pipe, twin.exact = copied(twin.pipe), False
        if twin.dice.random() < 0.5:
            twin.compile()

    return apply


add(Edit("saver", "deepcopy goes on", goes_on(copy.deepcopy)))
add(Edit("saver", "pickle goes on", goes_on(lambda pipe: pickle.loads(pickle.dumps(pipe)))))


@edit("saver", "state taken, edited in place")
@torch.no_grad()
def taken(twin: Twin) -> None:
    for value in list(twin.pipe.unet.state_dict().values())[::7]:
        if value.is_floating_point():
            value.mul_(1.1)


@edit("saver", "state loaded")
@torch.no_grad()
def loaded(twin: Twin) -> None:
    state = {name: weight * 1.05 for name, weight in twin.pipe.unet.state_dict().items()}
    twin.pipe.unet.load_state_dict(state, assign=twin.dice.random() < 0.5)
