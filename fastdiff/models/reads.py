"""What a compact network reads of modules, noted as it is read.

A value that was read must stay the object it is for as long as the network stands for the modules;
watch and fingerprints derive from the notes, so there is no list of attributes to keep by hand.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastdiff.models.lora import without_adapters
from fastdiff.models.originals import Reached, reached
from fastdiff.models.watch import Item, Unsupported, hooks, kind, replaced, watch

_PLAIN = (bool, int, float, str, tuple, type(None))
"""What a setting is made of."""

Setting = tuple[str, str, Any]
"""Path of a module or what it holds, attribute, value."""


class Reader:
    """A module, or what it holds: asked for an attribute, it notes that and its value."""

    def __init__(self, reads: "Reads", thing: Any) -> None:
        self._reads, self._thing = reads, thing

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._thing, name, None)
        self._reads.note(self._thing, name, value)
        if value is None and not hasattr(self._thing, name):
            raise AttributeError(f"a {kind(self._thing)} without {name}")
        return value


class Reads:
    """Reads `root` and all within it; `seal` ends that and begins the watch.

    A module that computes must be of a class that the reader knows by name, with the functions it
    came with. Modules of adapters are read elsewhere.
    """

    def __init__(self, root: nn.Module, rehearsed: "Reads | None" = None) -> None:
        """`rehearsed`: what has just read the same, so that nothing is noted or checked again."""
        self._root, self._rehearsed = root, rehearsed
        self.modules: list[nn.Module] = (
            without_adapters(root) if rehearsed is None else rehearsed.modules
        )
        self._hooks = hooks(self.modules) if rehearsed is None else []
        self.opened: dict[int, Any] = {}
        """Modules and what they hold, by id, of which attributes are read."""
        self._packages: set[str] = set()
        """Beside torch and diffusers, those whose classes were opened by a name with its path."""
        self._foreign: set[int] = set()
        """Modules that are called, so that what they compute is theirs."""
        self._notes: dict[tuple[int, str], Item] = {}
        self.values: list[tuple[Any, str, Any]] = []
        """(module or what it holds, attribute, value) of all that was read."""
        self._sealed: tuple[Any, ...] = ()
        self._watch: Any = None

    def open(self, thing: Any, *known: str | type) -> Any:
        """What reads of `thing` go through; Unsupported unless its class is one of the `known`.

        A name has its path where the class is neither torch's nor diffusers'; all that its package
        defines is followed and watched like diffusers' own code.
        """
        if self._rehearsed is not None:
            return thing
        if kind(thing) not in known and type(thing) not in known:
            names = " or ".join(k if isinstance(k, str) else k.__name__ for k in known)
            raise Unsupported(f"a {kind(thing)} where a {names} was expected")
        package, path, _ = kind(thing).partition(".")
        if path and kind(thing) in known:
            self._packages.add(package)
        self.opened[id(thing)] = thing
        return Reader(self, thing)

    def config(self, module: Any) -> Any:
        """What reads of a module's config go through; diffusers replaces it as a whole."""
        if self._rehearsed is not None:
            return module.config
        self.note(module, "_internal_dict", module.config)
        return Reader(self, module.config)

    def each(self, modules: Any, count: int | None = None) -> list[Any]:
        """The modules of a ModuleList, `count` of them if given."""
        self.open(modules, nn.ModuleList)
        if count is not None and len(modules) != count:
            raise Unsupported(f"{len(modules)} modules where {count} were expected")
        return list(modules)

    def inert(self, module: Any) -> None:
        """Read a module that returns what it is given, as a Dropout does after eval()."""
        if type(module) is not nn.Identity:
            dropout = self.open(module, nn.Dropout)
            if not 0 <= dropout.p <= 1:
                raise Unsupported(f"a Dropout of {dropout.p}")
            if dropout.p > 0 and dropout.training:
                raise Unsupported("a module in training mode")
        self.opened[id(module)] = module

    def silu(self, module: Any, what: str = "an activation") -> None:
        """Read a SiLU."""
        if type(module) is not nn.SiLU:
            raise Unsupported(f"{what} other than SiLU")
        self.open(module, nn.SiLU)

    def bare_norm(self, module: Any, width: int) -> float:
        """The eps of a LayerNorm without weight and bias, over `width` channels."""
        norm = self.open(module, nn.LayerNorm)
        if norm.weight is not None or norm.bias is not None:
            raise Unsupported("a LayerNorm with weight and bias where its block modulates it")
        if norm.normalized_shape != (width,):
            raise Unsupported(f"a LayerNorm over {norm.normalized_shape}")
        eps: float = norm.eps
        return eps

    def called(self, module: nn.Module) -> Any:
        """A module that is called as it is; nothing of it is read."""
        self._foreign.update(id(part) for part in module.modules())
        return module

    def unused(self, module: nn.Module | None) -> None:
        """A module, if it is there, whose result nobody reads."""
        if module is not None:
            self.called(module)

    def note(self, thing: Any, name: str, value: Any) -> None:
        """Note that an attribute was read; missing ones count as None."""
        if self._rehearsed is not None or (id(thing), name) in self._notes:
            return
        held = vars(thing)
        held = held["_buffers"] if name in held.get("_buffers", ()) else held
        self._notes[id(thing), name] = (held, name, held.get(name))
        self.values.append((thing, name, value))

    def seal(self) -> None:
        """Watch all that was read from now on; to be called when nothing is left to be read.

        Raises:
            Unsupported: a module within the root was not read, or some code is not its own.
        """
        if self._rehearsed is not None:
            return self.adopt(self._rehearsed)
        unread = {id(m) for m in self.modules} - self.opened.keys() - self._foreign
        for name, module in self._root.named_modules():
            if id(module) in unread:
                raise Unsupported(f"{name}, a {kind(module)} that diffusers does not have there")
        classes = map(type, self.opened.values())
        code = reached(classes, packages=self._packages)
        # children and parameters are watched where they lie
        notes = (n for n in self._notes.values() if not _kept(n[0], n[1]))
        items = [*notes, *code.items, *self._overrides(code)]
        others = [thing for thing in self.opened.values() if not isinstance(thing, nn.Module)]
        self._sealed = self.modules, items, (*code.dicts, *self._hooks), others

    def watch(self) -> Any:
        """What tells whether all that was read, when it was sealed, is still so."""
        if self._watch is None:
            self._watch = watch(*self._sealed)
        return self._watch

    def adopt(self, other: "Reads") -> None:
        """Watch what another has read of the same root, in place of reading it."""
        self._watch, self.values, self.opened = other.watch(), other.values, other.opened

    def settings(self) -> list[Setting]:
        """All numbers and words that were read, by path; they say what the modules compute."""
        paths = {id(module): name for name, module in self._root.named_modules()}
        for module in self._root.modules():
            for name, held in vars(module).items():
                paths.setdefault(id(held), f"{paths[id(module)]}.{name}")
        found = ((paths[id(t)], name, v) for t, name, v in self.values if isinstance(v, _PLAIN))
        return sorted(found, key=lambda setting: setting[:2])

    def _overrides(self, code: Reached) -> Iterator[Item]:
        """Where a function of an object's own would hide its class's: there is none."""
        methods = {cls: code.methods(cls) for cls in set(map(type, self.opened.values()))}
        for thing in self.opened.values():
            held = vars(thing)
            for name in methods[type(thing)]:
                if replaced(thing, name):
                    raise Unsupported(f"a {kind(thing)} with a {name} of its own")
                yield held, name, held.get(name)


def _kept(held: dict[str, Any], name: str) -> bool:
    """Whether the name is a child's or a parameter's."""
    return name in held.get("_modules", ()) or name in held.get("_parameters", ())


def check_conv(layer: Any, kernel: int, stride: int, padding: int) -> None:
    """Raise Unsupported unless a Conv2d that was read is square, zero-padded and plain.

    Its size is its weight's, not its kernel_size, which torch does not read.
    """
    wanted = {
        "stride": (stride, stride),
        "padding": (padding, padding),
        "padding_mode": "zeros",
        "groups": 1,
        "dilation": (1, 1),
    }
    found = {name: getattr(layer, name) for name in wanted}
    sides = tuple(layer.weight.shape[2:])
    if found != wanted or sides != (kernel, kernel):
        described = ", ".join(f"{name} {value}" for name, value in found.items())
        raise Unsupported(
            f"a {'×'.join(map(str, sides))} convolution with {described} where a plain"
            f" {kernel}×{kernel} convolution of stride {stride} and padding {padding} was expected"
        )
