"""The attributes and methods that diffusers and torch read while a picture is drawn, recorded."""

import functools
import types
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from edits.twins import Twin, draw, twins

PLAIN = (bool, int, float, str, tuple, type(None))


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The modules that fastdiff computes, by their names in the pipeline."""
    roots = {"unet": pipe.unet, "vae.decoder": pipe.vae.decoder, "vae.encoder": pipe.vae.encoder}
    return {
        f"{root}.{name}".rstrip("."): module
        for root, net in roots.items()
        for name, module in net.named_modules()
    }


def of_class(pipe: Any, own: type) -> list[Any]:
    """The modules of a class and of its subclasses."""
    return [module for module in networks(pipe).values() if isinstance(module, own)]


@dataclass(frozen=True)
class Reads:
    """What drawing an eager picture reads from the modules."""

    values: set[tuple[type, str]]
    """(class, attribute) of each plain value read."""
    methods: set[tuple[type, str]]
    """(class, method) of each method called."""

    @property
    def computing(self) -> tuple[type, ...]:
        """The classes whose forward is called, in a fixed order."""
        classes = {own for own, name in self.methods if name == "forward"}
        return tuple(sorted(classes, key=lambda own: own.__name__))


@functools.cache
def reads(processor: type) -> Reads:
    """The reads of a picture with attention processors of this class in the U-Net."""
    found = Reads(set(), set())
    eager, _ = twins()
    eager.pipe.unet.set_attn_processor(processor())
    for module in networks(eager.pipe).values():
        if not isinstance(module, nn.ModuleList):
            module.__class__ = _recording(type(module), found)
    draw(eager)
    return found


def all_reads() -> Reads:
    """The reads with the old attention processor, which reads more, and with torch's."""
    new, old = reads(AttnProcessor2_0), reads(AttnProcessor)
    return Reads(new.values | old.values, new.methods | old.methods)


def prepare(twin: Twin, own: type, name: str) -> None:
    """Set the old attention processor if only it reads this method or attribute."""
    if not {(own, name)} & (reads(AttnProcessor2_0).values | reads(AttnProcessor2_0).methods):
        twin.pipe.unet.set_attn_processor(AttnProcessor())


def _recording(own: Any, reads: Reads) -> Any:
    """A subclass that records the attributes read from its instances."""

    def ask(self: Any, name: str) -> Any:
        found = super(recording, self).__getattribute__(name)
        if isinstance(found, types.MethodType):
            if getattr(nn.Module, name, None) is not found.__func__ and found.__self__ is self:
                reads.methods.add((own, name))
        elif isinstance(found, PLAIN) and name in super(recording, self).__getattribute__(
            "__dict__"
        ):
            reads.values.add((own, name))
        return found

    recording = type(own.__name__, (own,), {"__getattribute__": ask, "__module__": own.__module__})
    return recording
