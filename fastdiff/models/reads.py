"""Reads modules' attributes for a compact network, and notes every read.

A value that was read must stay the same object as long as the network replaces the modules. The
watch and the fingerprints derive from the notes, so no list of attributes is kept by hand.
"""

import itertools
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from fastdiff.models.lora import without_adapters
from fastdiff.models.originals import Reached, reached
from fastdiff.models.switches import Switch
from fastdiff.models.watch import Item, Unsupported, hooks, kind, replaced, watch
from fastdiff.tables import plural

_PLAIN = (bool, int, float, str, tuple, type(None))
"""The types of a setting's value."""

_SWITCHED = 4
"""How many states of the switches keep their watch; guidance uses two or three."""

EPOCHS = itertools.count(1)
Setting = tuple[str, str, Any]
"""Path of a module or of an object in it, attribute, value."""


class Reader:
    """Wraps a module or an object in it; notes every attribute that is read, with its value."""

    def __init__(self, reads: "Reads", thing: Any) -> None:
        self._reads, self._thing = reads, thing

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._thing, name, None)
        self._reads.note(self._thing, name, value)
        if value is None and not hasattr(self._thing, name):
            raise AttributeError(f"a {kind(self._thing)} without {name}")
        return value


class Reads:
    """Reads `root` and everything in it; `seal` ends the reading and begins the watch.

    A module that computes must be of a known class, with that class's own functions. Modules of
    adapters are read elsewhere.
    """

    def __init__(self, root: nn.Module, rehearsed: "Reads | None" = None) -> None:
        """`rehearsed`: a finished read of the same modules, so nothing is noted or checked
        again."""
        self._root, self._rehearsed = root, rehearsed
        self.modules: list[nn.Module] = (
            without_adapters(root) if rehearsed is None else rehearsed.modules
        )
        self._hooks = hooks(self.modules) if rehearsed is None else []
        self.opened: dict[int, Any] = {}
        """Modules, and objects in them, whose attributes are read; by id."""
        self._packages: set[str] = set()
        """Packages, besides torch and diffusers, of classes that were opened by their path."""
        self._foreign: set[int] = set()
        """Modules that are called rather than borrowed."""
        self._notes: dict[tuple[int, str], Item] = {}
        self.values: list[tuple[Any, str, Any]] = []
        """Every read: (module or object in it, attribute, value)."""
        self._switches: list[Switch] = []
        self._places: tuple[list[Any], list[Any]] = [], []
        """The dicts and names of the switches: they are looked up before every step."""
        self._watch: Any = None
        """Depends on everything that was read except what the switches hold: make it at reading
        time, because it also notes what else exists."""
        self._switch_watches: dict[tuple[int, ...], Any] = {}
        """By the objects that the switches hold; a watch keeps these objects."""
        self._switched: tuple[int, ...] = ()
        self._adopted: Reads | None = None
        self.epoch = next(EPOCHS)
        """Grows with every loan in this process, when a loan's `refresh` has rewritten weights, and
        when `unchanged` finds other objects in the switches."""

    def open(self, thing: Any, *known: str | type) -> Any:
        """A Reader of `thing`; Unsupported unless its class is one of the `known`.

        A class of neither torch nor diffusers is named by its path; everything that its package
        defines is then followed and watched like diffusers' own code.
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
        """A Reader of a module's config, which diffusers always replaces as a whole."""
        if self._rehearsed is not None:
            return module.config
        self.note(module, "_internal_dict", module.config)
        return Reader(self, module.config)

    def each(self, modules: Any, count: int | None = None) -> list[Any]:
        """The modules of a ModuleList or Sequential; there must be `count` of them, if given."""
        self.open(modules, nn.ModuleList, nn.Sequential)
        if count is not None and len(modules) != count:
            raise Unsupported(f"{plural(len(modules), 'module')} where {count} were expected")
        return list(modules)

    def inert(self, module: Any) -> None:
        """Read a module that returns its input, such as a Dropout after eval()."""
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
        if self.open(module, nn.SiLU).inplace:
            raise Unsupported("a SiLU that overwrites its input")
        self.open(module, nn.SiLU)

    def activation(self, module: Any, what: str = "an activation") -> str:
        """Read a SiLU or an exact GELU: "silu" or "gelu"."""
        if type(module) is not nn.GELU:
            if type(module) is not nn.SiLU:
                raise Unsupported(f"{what} other than SiLU and GELU")
            self.silu(module)
            return "silu"
        by = self.open(module, nn.GELU).approximate
        if by != "none":
            raise Unsupported(f"a GELU approximated by {by}")
        return "gelu"

    def bare_norm(self, module: Any, width: int) -> float:
        """The eps of a LayerNorm without weight and bias, over `width` channels; ours are always
        computed in float32, as diffusers' FP32LayerNorm is."""
        norm = self.open(module, nn.LayerNorm, "FP32LayerNorm")
        if norm.weight is not None or norm.bias is not None:
            raise Unsupported("a LayerNorm with weight and bias in a block that modulates it")
        if norm.normalized_shape != (width,):
            raise Unsupported(f"a LayerNorm over {norm.normalized_shape}")
        eps: float = norm.eps
        return eps

    def called(self, module: nn.Module) -> Any:
        """Note a module that is called as it is; nothing in it is read."""
        self._foreign.update(id(part) for part in module.modules())
        return module

    def unused(self, module: nn.Module | None) -> None:
        """Note a module, or None, whose result is not used."""
        if module is not None:
            self.called(module)

    def note(self, thing: Any, name: str, value: Any) -> None:
        """Note that an attribute was read; a missing one counts as None."""
        if self._rehearsed is not None or (id(thing), name) in self._notes:
            return
        held = vars(thing)
        held = held["_buffers"] if name in held.get("_buffers", ()) else held
        self._notes[id(thing), name] = (held, name, held.get(name))
        self.values.append((thing, name, value))

    def switch(self, module: Any, name: str, *known: str) -> Switch:
        """Read an object that may be exchanged for one of another `known` class.

        Such an exchange leaves the loan valid, so code that depends on the class asks the returned
        Switch at every use.
        """
        found = Switch(vars(module), name, known)
        if self._rehearsed is None:
            self.values.append((module, name, found.check()))
            self._switches.append(found)
            self._places[0].append(found.held)
            self._places[1].append(name)
        return found

    @property
    def switched(self) -> tuple[int, ...]:
        """Identifies the objects that the switches hold now."""
        held, names = (self._adopted or self)._places
        return tuple(map(id, map(dict.get, held, names)))

    def seal(self) -> None:
        """Watch everything that was read from now on; call this after the last read.

        Raises:
            Unsupported: a module in the root was not read, or some code is not original.
        """
        if self._rehearsed is not None:
            return self.adopt(self._rehearsed)
        unread = {id(m) for m in self.modules} - self.opened.keys() - self._foreign
        for name, module in self._root.named_modules():
            if id(module) in unread:
                raise Unsupported(f"{name}, a {kind(module)} that diffusers does not have there")
        things = [*self.opened.values()]
        code = reached(map(type, things), packages=self._packages)
        # children and parameters are watched as such
        notes = [n for n in self._notes.values() if not _kept(n[0], n[1])]
        items = [*notes, *code.items, *self._overrides(code, things)]
        others = [thing for thing in things if not isinstance(thing, nn.Module)]
        self._watch = watch(self.modules, items, (*code.dicts, *self._hooks), others)
        self._watch_switches()

    def _watch_switches(self) -> Any:
        """A watch on the objects that the switches hold now; Unsupported if one of these is not of
        a known class, or its code is not original."""
        key = self.switched
        if key not in self._switch_watches:
            held = [switch.check() for switch in self._switches]
            things = {id(thing): thing for thing in held}.values()
            classes = map(type, (*self.opened.values(), *things))
            code = reached(classes, packages=self._packages)
            items = [*(s.item for s in self._switches), *code.items, *self._overrides(code, things)]
            dicts = [*code.dicts, *(vars(thing) for thing in things)]
            if len(self._switch_watches) >= _SWITCHED:
                self._switch_watches.clear()
            self._switch_watches[key] = watch((), items, dicts, things)
        return self._switch_watches[key]

    def unchanged(self) -> bool:
        """Whether everything that was read until `seal` is unchanged; a switch may hold another
        object of a known class."""
        source = self._adopted or self
        try:
            intact = source._watch.intact() and source._watch_switches().intact()
        except Unsupported:  # of what a switch holds now
            return False
        if intact and (now := self.switched) != self._switched:
            self._switched, self.epoch = now, next(EPOCHS)
        return bool(intact)

    def adopt(self, other: "Reads") -> None:
        """Take over another's reads of the same root, and their watch."""
        self._adopted, self.values, self.opened = other, other.values, other.opened
        self._switched = self.switched

    def settings(self) -> list[Setting]:
        """All numbers and strings that were read, by path; they define what the modules compute."""
        paths = {id(module): name for name, module in self._root.named_modules()}
        for module in self._root.modules():
            for name, held in vars(module).items():
                paths.setdefault(id(held), f"{paths[id(module)]}.{name}")
        found = ((paths[id(t)], name, v) for t, name, v in self.values if isinstance(v, _PLAIN))
        return sorted(found, key=lambda setting: setting[:2])

    def _overrides(self, code: Reached, things: Collection[Any]) -> Iterator[Item]:
        """The places where an object's own attribute would hide a function of its class."""
        methods = {cls: code.methods(cls) for cls in set(map(type, things))}
        for thing in things:
            held = vars(thing)
            for name in methods[type(thing)]:
                if replaced(thing, name):
                    raise Unsupported(f"a {kind(thing)} with a {name} of its own")
                yield held, name, held.get(name)


def _kept(held: dict[str, Any], name: str) -> bool:
    """Whether `name` is a child or a parameter."""
    return name in held.get("_modules", ()) or name in held.get("_parameters", ())


def check_conv(layer: Any, kernel: int, stride: int, padding: int) -> None:
    """Raise Unsupported unless a Conv2d that was read is square, zero-padded and plain.

    Its size is taken from its weight, as torch does, not from its kernel_size.
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
            f"a {'×'.join(map(str, sides))} convolution with {described}; expected a plain"
            f" {kernel}×{kernel} convolution of stride {stride} and padding {padding}"
        )
