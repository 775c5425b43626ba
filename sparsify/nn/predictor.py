"""Connectivity predictors: cheap scores that choose the keys of each query. One per block, as `attn.predictor`.

A predictor holds parameters and constants; the scores themselves are computed inside the attention op, so that a fast
path never writes them out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify.nn.tokens import TokenState
from sparsify.ops import attention, reference, selection
from sparsify.ops.selection import Ranking
from sparsify.ops.spec import Kind, Spec


class Reconstruction(NamedTuple):
    """What a token-lowrank predictor reconstructs attention from, while it learns to.

    Attributes:
        all_coefficients: instead of the largest, which choose the keys.
        raw_basis: W_up with its signs, instead of the basis as it is used.
    """

    all_coefficients: bool = True
    raw_basis: bool = True


class HeadLowrankPredictor(nn.Module):
    """Scores (q A_q).(k A_k): r coordinates inside the head (`docs/design.md`, equation 2).

    Args:
        head_dim: d.
        ranks: r of each of the H heads, 1 <= r <= d.
        folded: the projections are folded into `qkv`: no parameters, the first r coordinates are the scores'.

    Parameters (unfolded): a_q, a_k, [H, d, max r] each; columns past a head's r are 0.
    """

    def __init__(self, head_dim: int, ranks: tuple[int, ...], folded: bool) -> None:
        super().__init__()
        self.ranks, self.folded = ranks, folded
        if folded:
            self.a_q = self.a_k = None
        else:  # unfitted: the first r coordinates
            eye = torch.eye(head_dim, max(ranks)) * reference.rank_mask(ranks, torch.empty(0))  # (H, d, r)
            self.a_q, self.a_k = nn.Parameter(eye.clone()), nn.Parameter(eye.clone())

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: TokenState | None, scale: float, spec: Spec,
        backend: str, precision: str,
    ) -> Tensor:  # fmt: skip
        """Sparse attention over the predicted keys: [B, H, N, d] x 3 -> [B, N, H*d]."""
        size, place = (None, None) if tokens is None else (tokens.size, tokens.place)
        return attention.head_lowrank(
            q, k, v, self.a_q, self.a_k, mask, size, place, self.ranks, scale, spec, backend, precision
        )

    def ranking(
        self, q: Tensor, k: Tensor, mask: Tensor | None, tokens: TokenState | None, scale: float, spec: Spec
    ) -> Ranking:
        """What chooses the keys in `attend`, written out (`sparsify.ops.weights`); q, k [B, H, N, d]."""
        row, col = reference.head_lowrank_scores(q, k, self.a_q, self.a_k, self.ranks)
        shift = None if tokens is None or tokens.size is None else tokens.size.log() / scale
        return Ranking(row, col, col, shift, 1 / scale)

    def reconstruct(
        self, q: Tensor, k: Tensor, scale: float, form: Reconstruction, bias: Tensor | None = None
    ) -> Tensor:
        """The attention that the scores stand for, softmax(scores scale + bias): q, k [B, H, N, d], bias of the logits
        [1, H, N, N] or None -> float32 [B, H, N, N]."""
        row, col = reference.head_lowrank_scores(q.float(), k.float(), self.a_q, self.a_k, self.ranks)
        logits = (row @ col.mT) * scale
        return (logits if bias is None else logits + bias.float()).softmax(-1)

    def spec(self, scale: float, budget: int, shape: TailShape) -> Spec:
        """The constants of a call."""
        return Spec(budget, *shape)

    def kind(self) -> Kind:
        """What of this predictor decides how long a call takes; mean ranks that differ by less than 4 count as one."""
        heads, largest = len(self.ranks), max(self.ranks)
        total = min(heads * largest, max(largest + heads - 1, heads * 4 * -(-sum(self.ranks) // (4 * heads))))
        return Kind("head-folded" if self.a_q is None else "head", total, largest)

    def extra_repr(self) -> str:
        return f"ranks={','.join(map(str, self.ranks))}, folded={self.folded}"


class TokenLowrankPredictor(nn.Module):
    """The paper's predictor (Sparsifiner, Fig. 2): scores A~_down W_up over the tokens.

        A_down = softmax(q' (W_down k')' / sqrt(d)), the coef_topk largest kept -> A~_down        [N, r]
        scores = A~_down W_up                                                                     [N, N]

    Args:
        heads: H.
        head_dim: d.
        tokens: N, prefix tokens included; the parameters are tied to it (`resample`).
        prefix: P.
        rank: r.
        knobs: see `sparsify.config.TokenLowrank`; the same fields as a mapping.

    Parameters: w_down [r, N]; w_up [H or 1, r, N] (absent when shared with w_down); w_q, w_k [c, d] and b_q, b_k [c].
    """

    w_q: nn.Parameter | None
    w_k: nn.Parameter | None
    b_q: nn.Parameter | None
    b_k: nn.Parameter | None

    def __init__(self, heads: int, head_dim: int, tokens: int, prefix: int, rank: int, knobs: dict) -> None:
        super().__init__()
        self.rank, self.prefix, self.knobs = rank, prefix, dict(knobs)
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
        """W_up as it is used: sign and threshold applied, [H or 1, r, N]."""
        w = self.w_down.unsqueeze(0) if self.w_up is None else self.w_up
        if self.knobs["basis"] == "absolute":
            w = w.abs()
        threshold = self.knobs["basis_threshold"]
        return w * (w > threshold) if threshold > 0 else w

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tokens: TokenState | None, scale: float, spec: Spec,
        backend: str, precision: str,
    ) -> Tensor:  # fmt: skip
        """Sparse attention over the predicted keys: [B, H, N, d] x 3 -> [B, N, H*d]."""
        w_down, w_up = self.weights_of(q.shape[2], tokens)
        size, place = (None, None) if tokens is None else (tokens.size, tokens.place)
        return attention.token_lowrank(
            q, k, v, w_down, w_up, self.w_q, self.b_q, self.w_k, self.b_k, mask, size, place, scale, self.coef_scale, spec,
            backend, precision,
        )  # fmt: skip

    def weights_of(self, N: int, tokens: TokenState | None) -> tuple[Tensor, Tensor]:
        """W_down and W_up for the N tokens present: the columns of those that have left go, or go into another's.

        A merged token's column of W_down is the sum of its members' (W_down k' stays what it was for equal keys), its
        column of W_up their mean times the token's size (the attention that it is given as a whole).

        Returns:
            [r, N] and [1 or H, r, N]; [B, 1, r, N] and [B, 1 or H, r, N] where tokens have left.
        """
        basis, present = self.basis(), self.w_down.shape[1]
        if tokens is None or tokens.place is None:
            if present != N:
                raise ValueError(
                    f"token-lowrank predictor was made for {present} tokens, not {N}: "
                    "load the file with this image size, which resamples it"
                )
            return self.w_down, basis
        if present != self.prefix + tokens.patches:
            raise ValueError(
                f"token-lowrank predictor was made for {present} tokens, not {self.prefix + tokens.patches}: "
                "load the file with this image size, which resamples it"
            )
        down, up = self.w_down.expand(tokens.place.shape[0], 1, -1, -1), basis.expand(tokens.place.shape[0], -1, -1, -1)
        if tokens.size is None or tokens.owner is None or tokens.place.shape[1] == 0:  # tokens were dropped
            return self._columns(down, tokens.place), self._columns(up, tokens.place)
        members = torch.zeros_like(tokens.place, dtype=down.dtype)
        members = members.scatter_add(1, tokens.owner, torch.ones_like(tokens.owner, dtype=down.dtype))  # (B, n)
        factor = torch.cat([tokens.size[:, : self.prefix], tokens.size[:, self.prefix :] / members], 1)  # (B, N)
        up = self._sums(up, tokens.owner, N) * factor[:, None, None].to(up.dtype)
        return self._sums(down, tokens.owner, N), up

    def _columns(self, w: Tensor, place: Tensor) -> Tensor:
        """Columns of w [B, *, r, P + n0] of the prefix and of the patches `place` [B, n]."""
        index = place[:, None, None].expand(*w.shape[:3], -1) + self.prefix
        return torch.cat([w[..., : self.prefix], w.gather(3, index)], 3)

    def _sums(self, w: Tensor, owner: Tensor, N: int) -> Tensor:
        """Sums of the columns of w [B, *, r, P + n0] over the patches that each of the N tokens owns."""
        total = torch.zeros(*w.shape[:3], N - self.prefix, dtype=w.dtype, device=w.device)
        total = total.scatter_add(3, owner[:, None, None].expand(*w.shape[:3], -1), w[..., self.prefix :])
        return torch.cat([w[..., : self.prefix], total], 3)

    def ranking(
        self, q: Tensor, k: Tensor, mask: Tensor | None, tokens: TokenState | None, scale: float, spec: Spec
    ) -> Ranking:
        """What chooses the keys in `attend`, written out (`sparsify.ops.weights`); q, k [B, H, N, d]."""
        w_down, w_up = self.weights_of(q.shape[2], tokens)
        seen = k if mask is None else k * selection.alive(mask, q).unsqueeze(-1)
        p = (w_down, self.w_q, self.b_q, self.w_k, self.b_k)
        coef = reference.token_lowrank_coefficients(q, seen, p, self.coef_scale, spec)  # (B, H, N, r)
        col = w_up.to(coef.dtype).mT  # ([B,] H or 1, N, r)
        return Ranking(coef, col if col.dim() == 4 else col.unsqueeze(0), k, None, 0.0)

    def reconstruct(
        self, q: Tensor, k: Tensor, scale: float, form: Reconstruction, bias: Tensor | None = None
    ) -> Tensor:
        """The attention that the predictor writes as coefficients times basis: q, k [B, H, N, d] -> float32 [B, H, N, N].

        Not a distribution: nothing makes its rows positive or sum to 1. A bias of the logits is in what it is fitted to.
        """
        spec = self.spec(scale, 1, (self.prefix, "none", (1, 1), (1, 1), ()))
        if form.all_coefficients:
            spec = spec._replace(coef_topk=0, coef_threshold=0.0)
        weights = (self.w_down, self.w_q, self.b_q, self.w_k, self.b_k)
        coef = reference.token_lowrank_coefficients(
            q.float(), k.float(), weights, self.coef_scale, spec
        )  # (B, H, N, r)
        w_up = self.w_down.unsqueeze(0) if self.w_up is None else self.w_up
        return coef @ (w_up if form.raw_basis else self.basis()).float()

    def spec(self, scale: float, budget: int, shape: TailShape) -> Spec:
        """The constants of a call."""
        return Spec(budget, *shape, self.knobs["coef_topk"] or 0, self.knobs["coef_threshold"] or 0.0)

    def kind(self) -> Kind:
        """What of this predictor decides how long a call takes."""
        heads = 1 if self.w_up is None else self.w_up.shape[0]
        return Kind("token", self.rank, self.rank, self.knobs["channels"] or 0, heads)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Parameters as the authors' code draws them: truncated normal of deviation 0.02, biases 0; in place."""
        for name, parameter in self.named_parameters():
            drawn = nn.init.trunc_normal_(torch.empty(parameter.shape), std=0.02, generator=generator)
            parameter.copy_(torch.zeros_like(drawn) if name.startswith("b_") else drawn)

    @torch.no_grad()
    def resample(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        """Parameters for another patch grid, in place."""
        for name in ("w_down", "w_up"):
            w = getattr(self, name)
            if w is not None:
                setattr(self, name, nn.Parameter(resample(w, self.prefix, old, new), w.requires_grad))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, tokens={self.w_down.shape[1]}"


TailShape = tuple[int, str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""prefix P, tail, patch grid, cells, tile: fields of `Spec`, after the budget."""


def resample(w: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Token weights [..., P + h*w] of another patch grid, as position embeddings are resampled.

    Patch weights are shares of a sum over the patches, so they are scaled by old/new count; prefix weights stay.
    """
    if old == new:
        return w
    head, patch = w[..., :prefix], w[..., prefix:]
    lead = patch.shape[:-1]
    image = patch.reshape(-1, 1, *old).float()
    image = nn.functional.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    image = image * (old[0] * old[1] / (new[0] * new[1]))
    return torch.cat([head, image.reshape(*lead, -1).to(w.dtype)], dim=-1)
