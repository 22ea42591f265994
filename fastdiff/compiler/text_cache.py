"""Keeps the text encoders' outputs for the last prompts: `Options(text_cache=n)`.

The cache sits where `nn.Module.compile()` puts a compiled call, as a `Slot` does, so the encoder
keeps its identity, class and state_dict, and a deepcopy or pickle of it has no cache.
"""

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_leaves, tree_map

from fastdiff.compiler.parts import components
from fastdiff.compiler.taken import torch_compiled
from fastdiff.compiler.transforms import transformed
from fastdiff.errors import UserError
from fastdiff.families import plain
from fastdiff.models.snapshot import Unchanged, by_value, offload, snapshot
from fastdiff.models.watch import Unsupported, kind
from fastdiff.tables import plural

logger = logging.getLogger(__name__)
_CALL, _KEPT = "_compiled_call_impl", "_fastdiff_text_cache"
_LEFT = "_output_capturing_hooks_installed"
"""Where transformers notes that its hooks for hidden states are there."""
_PACKAGES = ("transformers",)
ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
"""The classes of transformers whose outputs are kept."""


@dataclass
class TextCache:
    """Replaces `encoder(...)`: returns the kept output of the same call, or calls the encoder."""

    name: str
    module: nn.Module
    most: int
    """How many outputs are kept; the one that was used longest ago goes first."""
    hits: int = 0
    misses: int = 0
    past: Counter[str] = field(default_factory=Counter)
    """Calls that the encoder answered although the cache may hold them, by reason."""
    _kept: OrderedDict[Any, Any] = field(default_factory=OrderedDict, repr=False)
    _last: Any = field(default=None, repr=False)
    """The last snapshot, and a watch that says whether it is still valid."""
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # must come first: dynamo traces neither locks nor loggers
        if torch.compiler.is_compiling():
            return self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        try:
            key = self._key(args, kwargs)
        except Unsupported as unsupported:
            self._went_past(str(unsupported))
            return self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                self.hits += 1
        if found is not None:
            _make_room(self.module)
            return _copied(found)
        result = self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        try:
            with torch.inference_mode(False), torch.no_grad():
                kept = _copied(result)
        except Unsupported as unsupported:
            self._went_past(str(unsupported))
            return result
        with self._lock:
            self.misses += 1
            self._kept[key] = kept
            self._kept.move_to_end(key)
            self._shrink()
        return result

    def __bool__(self) -> bool:
        # peft and others take a true value for torch.compile's, and then refuse to hotswap
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or pickle of the encoder has no cache."""
        return type(None), ()

    def __str__(self) -> str:
        counts = f"{plural(self.hits, 'hit')}, {self.misses} computed"
        notes = [f"text cache: {counts}, {len(self._kept)} of {self.most} kept"]
        notes += [
            f"{plural(count, 'call')} went past it: {why}" for why, count in self.past.items()
        ]
        if vars(self.module).get(_CALL) is not self:
            notes.append("another call has taken its place")
        return "; ".join(notes)

    def resize(self, most: int) -> None:
        with self._lock:
            self.most = most
            self._shrink()

    def put(self) -> None:
        """Take over the encoder's calls."""
        vars(self.module).update({_CALL: self, _KEPT: self})

    def end(self) -> None:
        """Forget everything, and give the encoder its own call back."""
        with self._lock:
            self._kept.clear()
        self._last = None
        names = vars(self.module)
        for name in (_CALL, _KEPT):  # keep a call that other code put there
            if names.get(name) is self:
                del names[name]

    def _shrink(self) -> None:
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)

    def _went_past(self, reason: str) -> None:
        with self._lock:
            known = reason in self.past
            self.past[reason] += 1
        if not known:
            logger.warning("fastdiff: a call of %s goes past the text cache: %s", self.name, reason)

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Everything that the encoder's output depends on. Unsupported if that is unknown."""
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*self.module.parameters(), *tensors)
        ):
            raise Unsupported("gradients are enabled; call it under torch.no_grad()")
        if reason := transformed(leaves):
            raise Unsupported(reason)
        if any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing():
            raise Unsupported("a CUDA graph is being captured")
        if tensors and torch.is_autocast_enabled(tensors[0].device.type):
            raise Unsupported("autocast is on")
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            raise Unsupported("global forward hooks are set")
        now = self._snapshot()
        call = by_value(args), tuple((name, by_value(kwargs[name])) for name in sorted(kwargs))
        ids = args[0] if args else kwargs.get("input_ids")
        return now, call, self._rows(ids), _flags()

    def _snapshot(self) -> Any:
        """`snapshot` of the encoder: the last one, if nothing has changed since."""
        last = self._last
        if last is not None and last[0].holds():
            return last[1]
        given = self.module, _PACKAGES, (_CALL, _KEPT, _LEFT)
        unchanged, now = Unchanged(*given), snapshot(*given)
        if last is not None and last[1] == now:
            now = last[1]  # keys share one
        self._last = unchanged, now
        return now

    def _rows(self, ids: Any) -> bytes:
        """The embeddings of the tokens, which textual inversion writes through `.data`."""
        table: Any = getattr(self.module.get_input_embeddings(), "weight", None)  # type: ignore[operator]
        if not isinstance(ids, Tensor) or table is None:
            return b""
        tokens = torch.tensor(sorted(set(ids.flatten().tolist())), dtype=torch.long)
        rows = table.data[tokens.clamp(0, len(table) - 1).to(table.device)]
        return bytes(rows.cpu().view(torch.uint8).numpy())


def text_encoders(target: Any, ignored: Iterable[str]) -> dict[str, nn.Module]:
    """The components of a pipeline whose outputs can be kept, by name, without those ignored.

    Raises:
        UserError: there is none, or torch.compile has compiled one already.
    """
    has = {name: part for name, part in components(target).items() if name not in ignored}
    found = {name: plain(part) for name, part in has.items() if _known(plain(part))}
    if not found:
        others = [f"{n} is a {kind(part)}" for n, part in has.items() if "text_encoder" in n]
        raise UserError(
            f"Options.text_cache needs a text encoder of the classes {', '.join(ENCODERS)}; of this"
            f" {type(target).__name__} {', '.join(others) or 'there is none'}"
        )
    for name, module in found.items():
        own = vars(module).get(_CALL)
        if torch_compiled(has[name]) and (own is None or own is not cache_of(module)):
            raise UserError(
                f"{name} is compiled with torch.compile already; undo that, or keep it with"
                f" Options(ignore=({name!r},))"
            )
    return found


def keep_texts(encoders: Mapping[str, nn.Module], most: int) -> None:
    """Give each text encoder a cache of `most` outputs; one that has a cache keeps it."""
    for name, module in encoders.items():
        if (cache := cache_of(module)) is None:
            cache = TextCache(name, module, most)
        cache.resize(most)
        cache.put()


def text_caches(target: Any) -> dict[str, TextCache]:
    """The caches of a pipeline's components, by name."""
    caches = ((name, cache_of(plain(part))) for name, part in components(target).items())
    return {name: cache for name, cache in caches if cache is not None}


def end_texts(target: Any, modules: Iterable[nn.Module]) -> None:
    """Restore the own calls of the text encoders in a pipeline and among `modules`."""
    found = (cache for module in modules if (cache := cache_of(module)) is not None)
    for cache in [*text_caches(target).values(), *found]:
        cache.end()


def cache_of(module: Any) -> TextCache | None:
    """The cache that was made for a text encoder; None if there is none."""
    cache = getattr(module, "__dict__", {}).get(_KEPT)
    return cache if isinstance(cache, TextCache) and cache.module is module else None


def _known(part: Any) -> bool:
    package, _, path = kind(part).partition(".")
    return package == "transformers" and path.rpartition(".")[2] in ENCODERS


def _copied(output: Any) -> Any:
    """`output` with its own tensors. Raises Unsupported if it holds anything but tensors."""
    copies: dict[int, Tensor] = {}

    def copied(leaf: Any) -> Any:
        if leaf is None:
            return None
        if type(leaf) is not Tensor:
            raise Unsupported(f"its output holds a {kind(leaf)}")
        if id(leaf) not in copies:  # a tensor that is there twice stays one
            copies[id(leaf)] = leaf.clone()
        return copies[id(leaf)]

    return tree_map(copied, output)


def _make_room(module: nn.Module) -> None:
    """Send the model before this one back to the CPU, as the call of an offloaded one would."""
    before = getattr(offload(module), "prev_module_hook", None)
    if before is not None:
        before.offload()


def _flags() -> tuple[Any, ...]:
    """The settings of torch that choose how the same product or attention is computed."""
    cuda, mkldnn = torch.backends.cuda, torch.backends.mkldnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        cuda.matmul.fp32_precision,
        mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )
