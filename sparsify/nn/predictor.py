"""Connectivity predictors: cheap scores that choose the keys of each query. One per block, as `attn.predictor`.

A predictor makes a `Ranking` of queries and keys (`sparsify.ops.selection`); the scores themselves, its product row @ col',
are computed inside the attention op, so that a fast path never writes them out.

A new predictor is a new subclass of `Predictor`, handed to `graft.graft`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify.nn.tokens import TokenState
from sparsify.ops.selection import Ranking, alive, rank_mask, top_b
from sparsify.ops.spec import Kind, Spec


class Reconstruction(NamedTuple):
    """What a token-lowrank predictor reconstructs attention from, while it learns to.

    Attributes:
        all_coefficients: instead of the largest, which choose the keys.
        raw_basis: W_up with its signs, instead of the basis as it is used.
    """

    all_coefficients: bool = True
    raw_basis: bool = True


class Predictor(nn.Module):
    """Chooses the keys of each query. Subclasses define `forward` and `macs`.

    Attributes:
        follows_merging: it needs to know which patches a merged token was made of (`TokenState.owner`).
    """

    follows_merging = False

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None, tokens: TokenState | None, spec: Spec) -> Ranking:
        """What ranks the keys of a call.

        Args:
            q, k: [B, H, N, d], as their product meets them.
            mask: see `sparsify.ops.selection.Context`.
            tokens: the tokens present, where some have been removed or merged.
            spec: the call's constants.
        """
        raise NotImplementedError

    def macs(self, N: int, P: int) -> int:
        """Multiply-accumulates for one image of N tokens, P of them prefix tokens: projections, and a score for every
        patch query and key."""
        raise NotImplementedError

    def shared(self) -> int:
        """Products of a score that its logit needs too, summed over the heads."""
        return 0

    def compared(self, heads: int, head_dim: int) -> int:
        """Features of a key that `clusters` compares, summed over the heads."""
        return heads * head_dim

    def kind(self) -> Kind:
        """What of this predictor decides how long a call takes."""
        return Kind(type(self).__name__, 0, 0)

    def reconstruct(
        self, q: Tensor, k: Tensor, scale: float, form: Reconstruction, bias: Tensor | None = None
    ) -> Tensor:
        """The attention that the scores stand for, while a predictor learns: q, k [B, H, N, d], bias of the logits
        [1, H, N, N] or None -> float32 [B, H, N, N]."""
        raise NotImplementedError(f"{type(self).__name__} does not learn to reconstruct attention")

    def resample(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        """Parameters for another patch grid, in place; nothing where they are not tied to it."""


class HeadLowrankPredictor(Predictor):
    """Scores (q A_q).(k A_k): r coordinates inside the head (`docs/design.md`, equation 2).

    Args:
        head_dim: d.
        ranks: r of each of the H heads, 1 <= r <= d.
        folded: the projections are folded into `qkv`: no parameters, the first r coordinates are the scores'.

    Parameters (unfolded): a_q, a_k, [H, d, max r] each; columns past a head's r are 0.
    """

    def __init__(self, head_dim: int, ranks: tuple[int, ...], folded: bool) -> None:
        super().__init__()
        self.head_dim, self.ranks, self.folded = head_dim, ranks, folded
        if folded:
            self.a_q = self.a_k = None
        else:  # unfitted: the first r coordinates
            eye = torch.eye(head_dim, max(ranks)) * rank_mask(ranks, torch.empty(0))  # (H, d, r)
            self.a_q, self.a_k = nn.Parameter(eye.clone()), nn.Parameter(eye.clone())

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None, tokens: TokenState | None, spec: Spec) -> Ranking:
        row = col = None
        if self.a_q is not None and self.a_k is not None:
            row, col = q @ self.a_q.to(q.dtype), k @ self.a_k.to(k.dtype)  # (B, H, N, r) each
        shift = None if tokens is None or tokens.size is None else tokens.size.log() / spec.scale
        return Ranking(row, col, None, shift, 1 / spec.scale, self.ranks, self.macs(int(q.shape[2]), spec.prefix))

    def macs(self, N: int, P: int) -> int:
        projections = 0 if self.folded else 2 * N * self.head_dim * sum(self.ranks)
        return (N - min(P, N)) * N * sum(self.ranks) + projections

    def shared(self) -> int:
        return sum(self.ranks) if self.folded else 0

    def compared(self, heads: int, head_dim: int) -> int:
        return sum(self.ranks)

    def reconstruct(
        self, q: Tensor, k: Tensor, scale: float, form: Reconstruction, bias: Tensor | None = None
    ) -> Tensor:
        """softmax(scores scale + bias)."""
        spec = Spec(1, 0, "none", (1, 1), (1, 1), scale=scale)
        q, k = q.float(), k.float()
        row, col, *_ = self(q, k, None, None, spec).written(q, k)
        logits = (row @ col.mT) * scale
        return (logits if bias is None else logits + bias.float()).softmax(-1)

    def kind(self) -> Kind:
        """Mean ranks that differ by less than 4 count as one."""
        heads, largest = len(self.ranks), max(self.ranks)
        total = min(heads * largest, max(largest + heads - 1, heads * 4 * -(-sum(self.ranks) // (4 * heads))))
        return Kind("head-folded" if self.folded else "head", total, largest)

    def extra_repr(self) -> str:
        return f"ranks={','.join(map(str, self.ranks))}, folded={self.folded}"


class TokenLowrankPredictor(Predictor):
    """The paper's predictor (Sparsifiner, Fig. 2): scores A~_down W_up over the tokens.

        A_down = softmax(q' (W_down k')' / sqrt(d)), the coef_topk largest kept -> A~_down        [N, r]
        scores = A~_down W_up                                                                     [N, N]

    Sizes of tokens and biases of the logits are not added to the scores, which predict what a token as a whole is given:
    they are in W_up.

    Args:
        heads: H.
        head_dim: d.
        tokens: N, prefix tokens included; the parameters are tied to it (`resample`).
        prefix: P.
        rank: r.
        knobs: see `sparsify.config.TokenLowrank`; the same fields as a mapping.

    Parameters: w_down [r, N]; w_up [H or 1, r, N] (absent when shared with w_down); w_q, w_k [c, d] and b_q, b_k [c].
    """

    follows_merging = True
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
        """W_up as it is used: sign and threshold applied, [H or 1, r, N]."""
        w = self.w_down.unsqueeze(0) if self.w_up is None else self.w_up
        if self.knobs["basis"] == "absolute":
            w = w.abs()
        threshold = self.knobs["basis_threshold"]
        return w * (w > threshold) if threshold > 0 else w

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None, tokens: TokenState | None, spec: Spec) -> Ranking:
        w_down, w_up = self.weights_of(q.shape[2], tokens)
        visible = k if mask is None else k * alive(mask, q).unsqueeze(-1)  # hidden keys leave no trace in W_down k
        rows = self.coefficients(q, visible, w_down)  # (B, H, N, r)
        col = w_up.to(rows.dtype).mT  # ([B,] H or 1, N, r)
        macs = self.macs(int(q.shape[2]), spec.prefix)
        return Ranking(rows, col if col.dim() == 4 else col.unsqueeze(0), k, None, 0.0, (self.rank,) * q.shape[1], macs)

    def coefficients(self, q: Tensor, k: Tensor, w_down: Tensor | None = None, sparse: bool = True) -> Tensor:
        """A~_down, float32 (float64 of float64): [B, H, N, r].

        Args:
            q, k: [B, H, N, d].
            w_down: [r, N] or [B, 1, r, N]; None: the parameter.
            sparse: only the coef_topk largest of a row, or those above coef_threshold; they are not renormalised.
        """
        if q.dtype in (torch.float16, torch.bfloat16):
            q, k = q.float(), k.float()
        if self.w_q is not None and self.w_k is not None:
            q = nn.functional.linear(q, self.w_q.to(q.dtype), None if self.b_q is None else self.b_q.to(q.dtype))
            k = nn.functional.linear(k, self.w_k.to(k.dtype), None if self.b_k is None else self.b_k.to(k.dtype))
        k_down = (self.w_down if w_down is None else w_down).to(k.dtype) @ k  # (B, H, r, c)
        coef = ((q @ k_down.mT) * self.coef_scale).softmax(-1)  # (B, H, N, r)
        topk, threshold = self.knobs["coef_topk"] or 0, self.knobs["coef_threshold"] or 0.0
        if sparse and 0 < topk < coef.shape[-1]:
            return coef * top_b(coef, topk)
        if sparse and threshold > 0:
            return coef * (coef > threshold)
        return coef

    def macs(self, N: int, P: int) -> int:
        """No credit is taken for zeros of W_up, nor for coefficients below a threshold (their number varies by image); a
        fixed top-k of the coefficients is credited."""
        H, d, n = self.heads, self.head_dim, N - min(P, N)
        channels, topk = self.knobs["channels"], self.knobs["coef_topk"] or 0
        c = channels or d
        reduction = 2 * H * N * d * c if channels else 0  # q W_q' and k W_k'
        down = H * N * c * self.rank  # W_down k'
        coefficients = H * n * c * self.rank  # q' K_down'
        up = H * n * N * (topk if 0 < topk < self.rank else self.rank)  # A~_down W_up
        return reduction + down + coefficients + up

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

    def reconstruct(
        self, q: Tensor, k: Tensor, scale: float, form: Reconstruction, bias: Tensor | None = None
    ) -> Tensor:
        """Coefficients times basis. Not a distribution: nothing makes its rows positive or sum to 1. A bias of the logits is
        in what it is fitted to."""
        coef = self.coefficients(q.float(), k.float(), sparse=not form.all_coefficients)  # (B, H, N, r)
        w_up = self.w_down.unsqueeze(0) if self.w_up is None else self.w_up
        return coef @ (w_up if form.raw_basis else self.basis()).float()

    def kind(self) -> Kind:
        knobs, heads = self.knobs, 1 if self.w_up is None else self.w_up.shape[0]
        topk, threshold = knobs["coef_topk"] or 0, knobs["coef_threshold"] or 0.0
        return Kind("token", self.rank, self.rank, knobs["channels"] or 0, heads, topk, threshold)

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
