"""Connectivity predictors: cheap scores that select the keys of each query. One per block, as `attn.predictor`.

A predictor turns queries and keys into a `Ranking` (`sparsify.ops.selection`). The scores, its product row @ col', are
computed inside the attention op, so that a fast path never writes them out. To add a predictor, subclass `Predictor` and
pass it to `graft.graft`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify.nn.tokens import TokenState
from sparsify.ops.selection import Ranking, alive, top_b
from sparsify.ops.spec import Kind, Spec


class Reconstruction(NamedTuple):
    """How a token-lowrank predictor reconstructs attention while it is trained."""

    all_coefficients: bool = True  # all of them, instead of the largest, which select the keys
    raw_basis: bool = True  # W_up with its signs, instead of the basis in use


class Predictor(nn.Module):
    """Ranks the keys of each query. Subclasses define `forward` and `macs`.

    Attributes:
        needs_owners: it needs `TokenState.owner`: which patches were merged into each token.
    """

    needs_owners = False

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None, tokens: TokenState | None, spec: Spec) -> Ranking:
        """The ranking of one call.

        Args:
            q, k: [B, H, N, d], after norms and rotation.
            mask: see `sparsify.ops.selection.Context`.
            tokens: the tokens present; None: all.
            spec: the call's constants.
        """
        raise NotImplementedError

    def macs(self, N: int, P: int) -> int:
        """Multiply-accumulates for one image of N tokens, P of them prefix tokens: projections, and a score for every
        patch query and key."""
        raise NotImplementedError

    def shared(self, heads: int) -> tuple[int, ...]:
        """Products of a score that are also part of the pair's logit, of each head."""
        return (0,) * heads

    def compared(self, heads: int, head_dim: int) -> tuple[int, ...]:
        """Features of a key that the `clusters` tail compares, of each head."""
        return (head_dim,) * heads

    def kind(self) -> Kind:
        """What of this predictor decides how long a call takes."""
        return Kind(type(self).__name__, sum(p.numel() for p in self.parameters()), 0)

    def set_ranks(self, ranks: tuple[int, ...]) -> None:
        """Score by other numbers of coordinates, one for each head; nothing where they are fixed."""

    def trim(self, width: int) -> None:
        """Forget what only ranks above `width` need."""

    def reconstruct(
        self, q: Tensor, k: Tensor, scale: float, form: Reconstruction, bias: Tensor | None = None
    ) -> Tensor:
        """The attention that the scores approximate, for training: q, k [B, H, N, d], bias of the logits [1, H, N, N] or
        None -> float32 [B, H, N, N]."""
        raise NotImplementedError(f"{type(self).__name__} does not learn to reconstruct attention")

    def resample(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        """Adapt parameters to another patch grid, in place; nothing where they do not depend on it."""


class HeadLowrankPredictor(Predictor):
    """Scores (q A_q).(k A_k): r coordinates inside the head (`docs/design.md`, equation 2).

    Args:
        head_dim: d.
        ranks: r of each of the H heads, 1 <= r <= d.
        folded: A_q and A_k are folded into `qkv`: no parameters, the first r coordinates of q and k give the scores.
        width: the most that a head can be set to (`set_ranks`): columns of A_q and A_k; None: the largest rank.

    Parameters (not folded): a_q, a_k, [H, d, width] each; columns past a head's r are not used.
    """

    def __init__(self, head_dim: int, ranks: tuple[int, ...], folded: bool, width: int | None = None) -> None:
        super().__init__()
        self.head_dim, self.folded, self.width = head_dim, folded, width or max(ranks)
        self.set_ranks(ranks)
        if folded:
            self.a_q = self.a_k = None
        else:  # before fitting: the first coordinates
            eye = torch.eye(head_dim, self.width).expand(len(ranks), -1, -1)  # (H, d, width)
            self.a_q, self.a_k = nn.Parameter(eye.clone()), nn.Parameter(eye.clone())

    def set_ranks(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks
        self.products = sum(ranks)  # of one score, over all heads

    def trim(self, width: int) -> None:
        if self.a_q is not None and self.a_k is not None and width < self.a_q.shape[-1]:
            self.a_q, self.a_k = (nn.Parameter(a[..., :width].clone()) for a in (self.a_q, self.a_k))
        self.width = min(self.width, width)

    def by_head(self) -> list[tuple[Tensor, Tensor]]:
        """A_q and A_k of each head, [d, r] each; not folded."""
        assert self.a_q is not None and self.a_k is not None
        return [(self.a_q[h, :, :r], self.a_k[h, :, :r]) for h, r in enumerate(self.ranks)]

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None, tokens: TokenState | None, spec: Spec) -> Ranking:
        row = col = None
        if self.a_q is not None and self.a_k is not None:
            used = slice(max(self.ranks))
            row, col = q @ self.a_q[..., used].to(q.dtype), k @ self.a_k[..., used].to(k.dtype)  # (B, H, N, r) each
        shift = None if tokens is None or tokens.size is None else tokens.size.log() / spec.scale
        return Ranking(row, col, None, shift, 1 / spec.scale, self.ranks, self.macs(int(q.shape[2]), spec.prefix))

    def macs(self, N: int, P: int) -> int:
        projections = 0 if self.folded else 2 * N * self.head_dim
        return ((N - min(P, N)) * N + projections) * self.products

    def shared(self, heads: int) -> tuple[int, ...]:
        return self.ranks if self.folded else (0,) * heads

    def compared(self, heads: int, head_dim: int) -> tuple[int, ...]:
        return self.ranks

    def reconstruct(
        self, q: Tensor, k: Tensor, scale: float, form: Reconstruction, bias: Tensor | None = None
    ) -> Tensor:
        """softmax(scores scale + bias)."""
        spec = Spec.uniform(1, 0, "none", (1, 1), (1, 1), scale=scale)
        q, k = q.float(), k.float()
        row, col, *_ = self(q, k, None, None, spec).written(q, k)
        logits = (row @ col.mT) * scale
        return (logits if bias is None else logits + bias.float()).softmax(-1)

    def kind(self) -> Kind:
        """Mean ranks that differ by less than 4 count as one."""
        heads, largest = len(self.ranks), max(self.ranks)
        total = min(heads * largest, max(largest + heads - 1, heads * 4 * -(-self.products // (4 * heads))))
        return Kind("head-folded" if self.folded else "head", total, largest)

    def extra_repr(self) -> str:
        return f"ranks={','.join(map(str, self.ranks))}, folded={self.folded}"


class TokenLowrankPredictor(Predictor):
    """The paper's predictor (Sparsifiner, Fig. 2): scores A~_down W_up over the tokens.

        A_down = softmax(q' (W_down k')' / sqrt(d)), the coef_topk largest kept -> A~_down        [N, r]
        scores = A~_down W_up                                                                     [N, N]

    Token sizes and biases of the logits are not added to the scores: W_up contains them, as it is fitted to the attention
    that a whole token gets.

    Args:
        heads: H.
        head_dim: d.
        tokens: N, prefix tokens included; the size of the parameters (`resample`).
        prefix: P.
        rank: r.
        knobs: the fields of `sparsify.config.TokenLowrank`.

    Parameters: w_down [r, N]; w_up [H or 1, r, N] (absent when shared with w_down); w_q, w_k [c, d] and b_q, b_k [c].
    """

    needs_owners = True
    w_q: nn.Parameter | None
    w_k: nn.Parameter | None
    b_q: nn.Parameter | None
    b_k: nn.Parameter | None

    def __init__(self, heads: int, head_dim: int, tokens: int, prefix: int, rank: int, knobs: dict) -> None:
        super().__init__()
        self.heads, self.head_dim, self.rank, self.prefix, self.knobs = heads, head_dim, rank, prefix, dict(knobs)
        self.w_down = nn.Parameter(torch.zeros(rank, tokens))
        channels = knobs["channels"]
        self.w_up: nn.Parameter | None = None
        if not knobs["shared_projection"]:
            self.w_up = nn.Parameter(torch.zeros(1 if knobs["shared_heads"] else heads, rank, tokens))
        for name in ("w_q", "w_k", "b_q", "b_k"):
            shape = (channels, head_dim) if name.startswith("w") else (channels,)
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)) if channels else None)
        self.coef_scale = (heads if knobs["scale"] == "heads" else head_dim) ** -0.5

    def basis(self) -> Tensor:
        """W_up in use: absolute value and threshold applied, [H or 1, r, N]."""
        w = self.raw_basis()
        if self.knobs["basis"] == "absolute":
            w = w.abs()
        threshold = self.knobs["basis_threshold"]
        return w * (w > threshold) if threshold > 0 else w

    def raw_basis(self) -> Tensor:
        """W_up with its signs, [H or 1, r, N]; W_down where they are shared."""
        return self.w_down.unsqueeze(0) if self.w_up is None else self.w_up

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None, tokens: TokenState | None, spec: Spec) -> Ranking:
        w_down, w_up = self.weights_of(q.shape[2], tokens)
        visible = k if mask is None else k * alive(mask, q).unsqueeze(-1)  # hidden keys add nothing to W_down k
        row = self.coefficients(q, visible, w_down)  # (B, H, N, r)
        col = w_up.to(row.dtype).mT  # ([B,] H or 1, N, r)
        macs = self.macs(int(q.shape[2]), spec.prefix)
        return Ranking(row, col if col.dim() == 4 else col.unsqueeze(0), k, None, 0.0, (self.rank,) * q.shape[1], macs)

    def coefficients(self, q: Tensor, k: Tensor, w_down: Tensor | None = None, sparse: bool = True) -> Tensor:
        """A~_down, float32 (float64 of float64): [B, H, N, r].

        Args:
            q, k: [B, H, N, d].
            w_down: [r, N] or [B, 1, r, N]; None: the parameter.
            sparse: keep only the coef_topk largest of each row, or those above coef_threshold, without renormalising.
        """
        if q.dtype in (torch.float16, torch.bfloat16):
            q, k = q.float(), k.float()
        if self.w_q is not None and self.w_k is not None:
            q = nn.functional.linear(q, self.w_q.to(q.dtype), None if self.b_q is None else self.b_q.to(q.dtype))
            k = nn.functional.linear(k, self.w_k.to(k.dtype), None if self.b_k is None else self.b_k.to(k.dtype))
        k_down = (self.w_down if w_down is None else w_down).to(k.dtype) @ k  # (B, H, r, c)
        coef = ((q @ k_down.mT) * self.coef_scale).softmax(-1)  # (B, H, N, r)
        if not sparse:
            return coef
        topk, threshold = self.knobs["coef_topk"] or 0, self.knobs["coef_threshold"] or 0.0
        if 0 < topk < coef.shape[-1]:
            return coef * top_b(coef, topk)
        return coef * (coef > threshold) if threshold > 0 else coef

    def macs(self, N: int, P: int) -> int:
        """Zeros of W_up count, and so do coefficients below a threshold (their number varies by image); of a top-k only k
        coefficients count."""
        H, r, n = self.heads, self.rank, N - min(P, N)
        channels, topk = self.knobs["channels"], self.knobs["coef_topk"] or 0
        c, largest = channels or self.head_dim, topk if 0 < topk < r else r
        reduction = 2 * H * N * self.head_dim * c if channels else 0  # q W_q' and k W_k'
        return reduction + H * N * c * r + H * n * c * r + H * n * N * largest  # W_down k'; q' K_down'; A~_down W_up

    def weights_of(self, N: int, tokens: TokenState | None) -> tuple[Tensor, Tensor]:
        """W_down and W_up for the N tokens present: columns of dropped tokens are removed, those of merged ones combined.

        A merged token's column of W_down is the sum of its members' (W_down k' is unchanged for equal keys); its column of
        W_up is their mean times the token's size (the attention that the token gets as a whole).

        Returns:
            [r, N] and [1 or H, r, N]; [B, 1, r, N] and [B, 1 or H, r, N] once tokens were removed.
        """
        whole = N if tokens is None or tokens.place is None else self.prefix + tokens.patches
        made_for = self.w_down.shape[1]
        if made_for != whole:
            raise ValueError(
                f"token-lowrank predictor was made for {made_for} tokens, not {whole}: "
                "load the file with this image size, which resamples it"
            )
        if tokens is None or tokens.place is None:
            return self.w_down, self.basis()
        B, P = tokens.place.shape[0], self.prefix
        down, up = self.w_down.expand(B, 1, -1, -1), self.basis().expand(B, -1, -1, -1)
        owner = None if tokens.size is None or tokens.place.shape[1] == 0 else tokens.owner  # None: dropped, not merged
        down, up = self._present(down, tokens.place, owner), self._present(up, tokens.place, owner)
        if tokens.size is None or owner is None:
            return down, up
        members = torch.zeros_like(tokens.place, dtype=down.dtype)
        members = members.scatter_add(1, owner, torch.ones_like(owner, dtype=down.dtype))  # (B, n)
        factor = torch.cat([tokens.size[:, :P], tokens.size[:, P:] / members], 1)  # (B, N)
        return down, up * factor[:, None, None].to(up.dtype)

    def _present(self, w: Tensor, place: Tensor, owner: Tensor | None) -> Tensor:
        """Columns of w [B, *, r, P + n0] for the tokens present: those of the patches `place` [B, n], or with `owner`
        [B, n0] the sum over each token's patches."""
        lead, patch = w.shape[:3], w[..., self.prefix :]
        if owner is None:
            patch = patch.gather(3, place[:, None, None].expand(*lead, -1))
        else:
            total = torch.zeros(*lead, place.shape[1], dtype=w.dtype, device=w.device)
            patch = total.scatter_add(3, owner[:, None, None].expand(*lead, -1), patch)
        return torch.cat([w[..., : self.prefix], patch], 3)

    def reconstruct(
        self, q: Tensor, k: Tensor, scale: float, form: Reconstruction, bias: Tensor | None = None
    ) -> Tensor:
        """Coefficients times basis. Rows need not be positive or sum to 1. The bias is ignored: the basis contains it."""
        coef = self.coefficients(q.float(), k.float(), sparse=not form.all_coefficients)  # (B, H, N, r)
        return coef @ (self.raw_basis() if form.raw_basis else self.basis()).float()

    def kind(self) -> Kind:
        knobs, heads = self.knobs, 1 if self.w_up is None else self.w_up.shape[0]
        topk, threshold = knobs["coef_topk"] or 0, knobs["coef_threshold"] or 0.0
        return Kind("token", self.rank, self.rank, knobs["channels"] or 0, heads, topk, threshold)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialise as the authors' code does: truncated normal with standard deviation 0.02, biases 0; in place."""
        for name, parameter in self.named_parameters():
            initial = nn.init.trunc_normal_(torch.empty(parameter.shape), std=0.02, generator=generator)
            parameter.copy_(torch.zeros_like(initial) if name.startswith("b_") else initial)

    @torch.no_grad()
    def resample(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        for name in ("w_down", "w_up"):
            w = getattr(self, name)
            if w is not None:
                setattr(self, name, nn.Parameter(resample(w, self.prefix, old, new), w.requires_grad))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, tokens={self.w_down.shape[1]}"


def resample(w: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Token weights [..., P + h*w] for another patch grid, resampled as timm resamples position embeddings.

    Patch weights are fractions of a sum over patches, so they are scaled by old/new count; prefix weights do not change.
    """
    if old == new:
        return w
    patch = w[..., prefix:]
    image = patch.reshape(-1, 1, *old).float()
    image = nn.functional.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    image = image * (old[0] * old[1] / (new[0] * new[1]))
    return torch.cat([w[..., :prefix], image.reshape(*patch.shape[:-1], -1).to(w.dtype)], dim=-1)
