"""UnCLIP's prior on borrowed weights: a causal transformer that predicts a CLIP image embedding.

A picture's tokens are its text, the text's embedding, the time, the noisy image embedding and
`prd`, from which the prediction is read. With a text mask each token sees only those before it. So
text and text embedding, all tokens but three, are the same in every step: their keys and values in
all layers are computed once a picture.

The other tokens of all pictures are one sequence in a batch of one, ordered by kind (time, prd,
image embedding), so that those of one kind are adjacent. A mask keeps the pictures apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.concat import concat
from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import scope
from fastdiff.models.blocks import repeated, require
from fastdiff.models.borrow import Loan, Norm, Weights
from fastdiff.models.checks import check_count, checked
from fastdiff.models.embeddings import Embedding, Sinusoid, borrow_embedding, borrow_sinusoid
from fastdiff.models.hoisted import Hoisted
from fastdiff.models.prior_block import Block, borrow_prior_block
from fastdiff.models.sums import Sum

HIDDEN = -30000.0
"""Added to the scores of other pictures' tokens; diffusers' two masks add -10000 each."""
_CLEAR = 5000.0
"""By how much a hidden token's score must be lower than a visible one's: exp(-5000) is 0."""


class Conditions(NamedTuple):
    """The network's inputs besides latents and timesteps, as `forward` names them. G: 2 with
    guidance, unconditional first."""

    proj_embedding: Tensor | None
    """[G·B, D'] the text's embedding."""
    encoder_hidden_states: Tensor | None
    """[G·B, T, D''] the text."""
    attention_mask: Tensor | None
    """[G·B, T], bool: which of the text's tokens are seen."""


class Constants(NamedTuple):
    position: Tensor
    """[G·B, D] of the image embedding."""
    mask: Tensor
    """[1, 1, n·G·B, (T + 1 + n)·G·B] for the n tokens a picture that change."""
    cache: tuple[Tensor, ...]
    """[1, G·B·(T + 1), 3·D] for each block: queries, keys and values of the constant tokens. The
    queries are not used."""


@dataclass(frozen=True)
class Prior:
    """PriorTransformer."""

    recordable: ClassVar[bool] = True
    sinusoid: Sinusoid
    time: Embedding
    embedding_norm: Norm | None
    embedding: Weights
    text: Weights | None
    """None if texts have the network's width already."""
    proj_in: Weights
    positions: Tensor
    """[1, L, D]: of text, text embedding, time, image embedding and, if there is one, prd."""
    prd: Tensor | None
    """[1, 1, D]; None: the prediction is read at the image embedding."""
    causal: Tensor
    """[1, L, L] added to the scores: low for a key that comes after the query."""
    norm_in: Norm | None
    blocks: tuple[Block, ...]
    norm_out: Norm
    proj_out: Weights

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    @property
    def changing(self) -> int:
        """The tokens of a picture that change from step to step."""
        return 2 if self.prd is None else 3

    @property
    def constant(self) -> int:
        """The tokens of a picture that do not: T + 1."""
        return self.positions.shape[1] - self.changing

    def check(self, latents: Tensor, given: Conditions, copies: int = 1) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it, or if the
        network has no text mask.

        latents: [B, D]. copies: G.
        """
        embedding, text, mask = given
        require(
            mask is not None,
            "it was given no attention_mask, without which all its tokens change in every step",
        )
        assert mask is not None
        weight, tokens = self.proj_in.weight, self.constant - 1
        checked("hidden_states", latents, weight, weight.shape[1], 2)
        wide = self.embedding.weight.shape[1]
        embedding = checked("proj_embedding", embedding, weight, wide, 2)
        check_count("proj_embedding", embedding, latents, copies)
        wide = weight.shape[0] if self.text is None else self.text.weight.shape[1]
        text = checked("encoder_hidden_states", text, weight, wide, 3)
        check_count("encoder_hidden_states", text, latents, copies)
        require(text.shape[1] == tokens, f"a text of {text.shape[1]} tokens, not of {tokens}")
        own = tuple(mask.shape) == tuple(text.shape[:2]) and mask.device == weight.device
        require(own, f"attention_mask {list(mask.shape)} on {mask.device} for this text")
        if len(latents) > 1 and not latents.is_meta:  # hidden tokens count 0 times what they are
            whole = torch.stack([t.isfinite().all() for t in (latents, embedding, text)]).all()
            require(bool(whole), "values that are not finite, which would reach other pictures")

    def hoist(self, given: Conditions, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """Compute everything that does not depend on the latents.

        Args:
            given: accepted by `check`.
            timesteps: [steps, n], n = 1 or one for each picture.

        Raises:
            Unsupported: a token of the text sees later tokens: its mask hides all those before.
        """
        embedding, text, told = given
        assert embedding is not None
        assert text is not None
        assert told is not None
        many = timesteps.shape[1]
        require(many > 0 and len(text) % many == 0, f"{many} timesteps for {len(text)} texts")
        mask = (1 - told.to(self.dtype)) * -10000.0
        mask = torch.nn.functional.pad(mask, (0, self.changing + 1))
        mask = (mask[:, None] + self.causal).to(self.dtype)
        self._check_cut(mask)
        place = self.positions[0, self.constant + 1]
        return Hoisted(
            self._rows(timesteps.to(text.device), len(text)),
            Constants(
                place.expand(len(text), -1).contiguous(),
                self._between(mask),
                self._cache(embedding, text, mask[:, None]),
            ),
        )

    def _check_cut(self, mask: Tensor) -> None:
        """Raise Unsupported if a constant token sees one that changes; mask [G·B, L, L]."""
        if mask.device.type == "meta":
            return
        first = mask[:, : self.constant]
        own, later = first.split([self.constant, self.changing], dim=2)
        clear = (own.amax(2) - later.amax(2)).amin()
        others = mask[:, self.constant :].amax(2).amin() - HIDDEN
        clear, others = torch.stack([clear, others]).tolist()  # one read by the host a picture
        require(clear >= _CLEAR, "an attention_mask that hides the first token of a text")
        require(others >= _CLEAR, "a causal mask that hides all tokens from one of them")

    def _between(self, mask: Tensor) -> Tensor:
        """`Constants.mask` from each picture's own, [G·B, L, L]."""
        pictures, first = len(mask), self.constant
        # in the order of the tokens: time, prd, image embedding
        order = [first, *range(first + 2, first + self.changing), first + 1]
        own = mask[:, order].transpose(0, 1)
        same = torch.eye(pictures, dtype=torch.bool, device=mask.device)
        hidden = mask.new_tensor(HIDDEN)
        before = torch.where(same[..., None], own[:, :, None, :first], hidden)
        among = torch.where(same[:, None], own[..., order, None], hidden)
        return torch.cat([before.flatten(2), among.flatten(2)], dim=2).flatten(0, 1)[None, None]

    def _cache(self, embedding: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """`Constants.cache`; mask [G·B, 1, L, L]."""
        with scope("constant tokens"):
            if self.embedding_norm is not None:
                embedding = Sum(embedding[:, None]).layer_normed(self.embedding_norm)[:, 0]
            last = linear(embedding, self.embedding.weight, self.embedding.bias)
            if self.text is not None:
                text = linear(text, self.text.weight, self.text.bias)
            tokens = torch.cat([text, last[:, None]], dim=1) + self.positions[:, : self.constant]
            x, mask = self._begun(tokens), mask[..., : self.constant, : self.constant]
            kept: list[Tensor] = []
            for block in self.blocks:
                packed = block.packed(x)
                kept.append(packed.flatten(0, 1)[None])
                if len(kept) < len(self.blocks):
                    x = block(x, packed, packed, mask)
            return tuple(kept)

    def _rows(self, timesteps: Tensor, texts: int) -> Tensor:
        """[steps, n·G·B, D]: the embedded timesteps and, if there is one, the prd token."""
        with scope("time rows"):
            times = self.time(self.sinusoid(timesteps).to(self.dtype))
            rows = times.repeat(1, texts // times.shape[1], 1) + self.positions[:, self.constant]
            if self.prd is None:
                return rows
            prd = (self.prd + self.positions[:, -1:]).expand(len(rows), texts, -1)
            return torch.cat([rows, prd], dim=1)

    def _begun(self, tokens: Tensor) -> Sum:
        x = Sum(tokens)
        return x if self.norm_in is None else Sum(x.layer_normed(self.norm_in))

    def pack(self, latents: Tensor) -> Tensor:
        """[B, D], unchanged."""
        return latents

    def predict(self, x: Tensor, row: Tensor, constants: Constants) -> Tensor:
        """The part that every step repeats: [B, D] -> [G·B, D]; `row`: of `Hoisted.rows`."""
        pictures, wide = constants.position.shape
        with scope("image embedding"):
            asked = linear(
                repeated(x, pictures),
                self.proj_in.weight,
                self.proj_in.bias,
                residual=constants.position,
            )
            tokens = concat(row.view(1, -1), asked.view(1, -1)).view(1, -1, wide)
            h = self._begun(tokens)
        answers = slice(pictures, 2 * pictures)  # of prd, or of the image embedding without it
        for i, (block, cache) in enumerate(zip(self.blocks, constants.cache, strict=True)):
            with scope(f"block {i}"):
                packed, mask = block.packed(h), constants.mask
                seen = concat(cache.view(1, -1), packed.view(1, -1)).view(1, -1, 3 * wide)
                if i + 1 == len(self.blocks):
                    h = Sum(h.closed()[:, answers])
                    packed, mask = packed[:, answers], mask[:, :, answers]
                h = block(h, packed, seen, mask)
        with scope("out"):
            y = h.layer_normed(self.norm_out)[0]
            return linear(y, self.proj_out.weight, self.proj_out.bias)

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        """[B, D] -> [B, D], or [B, 1, D] without a prd token, as diffusers'."""
        return x if self.prd is not None else x[:, None]


def borrow_prior(module: Any, loan: Loan) -> Prior:
    """Borrow a PriorTransformer's weights; raises Unsupported for other structures."""
    net, config = loan.open(module, "PriorTransformer"), loan.config(module)
    blocks = tuple(borrow_prior_block(block, loan) for block in loan.each(net.transformer_blocks))
    require(len(blocks) > 0, "a prior without blocks")
    positions, prd = loan.parameter(net.positional_embedding), net.prd_embedding
    text, norm, norm_in = net.encoder_hidden_states_proj, net.embedding_proj_norm, net.norm_in
    prior = Prior(
        sinusoid=borrow_sinusoid(net.time_proj, loan),
        time=borrow_embedding(net.time_embedding, loan),
        embedding_norm=None if norm is None else loan.norm(norm),
        embedding=loan.linear(net.embedding_proj),
        text=None if text is None else loan.linear(text),
        proj_in=loan.linear(net.proj_in),
        positions=positions,
        prd=None if prd is None else loan.parameter(prd),
        causal=net.causal_attention_mask,
        norm_in=None if norm_in is None else loan.norm(norm_in),
        blocks=blocks,
        norm_out=loan.norm(net.norm_out),
        proj_out=loan.linear(net.proj_to_clip_embeddings),
    )
    more, heads = net.additional_embeddings, config.num_attention_heads
    require(
        more == prior.changing + 1 and prior.constant > 1,
        f"{more} tokens beside the text's {prior.constant - 1}; expected {prior.changing + 1}",
    )
    require(all(block.heads == heads for block in blocks), f"a mask for {heads} heads")
    length, mask = positions.shape[1], prior.causal
    fits = tuple(mask.shape) == (1, length, length) and mask.device == loan.device
    require(fits, f"a causal mask {list(mask.shape)} on {mask.device} for {length} tokens")
    loan.seal()
    return prior
