"""A second count of MACs, independent of fvcore and of `sparsify.ops.macs`; if the two differ, one of them has a bug.

Hooks count linear, convolution and norm layers from the shapes of their input and weight, and attention from the number
of non-zeros of its mask, which for a budget of b keys is

    nnz = P N + (N - P) b        for each head of each image: prefix rows in full, b keys for each patch row

A block that drops or merges tokens calls the parts of its attention itself, so the hook is on the block, and counts from
the number of tokens that come in and the share that its stage keeps.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from sparsify.nn import hosts, projection
from sparsify.nn.attention import GraftedAttention, SparseAttention, Sparsity
from sparsify.nn.merging import rounds
from sparsify.nn.predictor import HeadLowrankPredictor, Predictor, TokenLowrankPredictor
from sparsify.nn.token_models import token_blocks
from sparsify.nn.tokens import TokenState
from sparsify.ops.tails import LLOYD_STEPS, known


@dataclass(frozen=True)
class Analytic:
    """MACs of one call."""

    total: int  # the whole model
    by_module: Mapping[str, int]  # what each counted module does itself (not its children), by name
    # query-key pairs inside the blocks' attention: kept pairs and prefix rows, or all pairs where it is dense
    pairs: int
    predictor: int  # this and the next two: as in `sparsify.measure.figures.Profile`
    tail: int
    stages: int
    tokens: tuple[tuple[int, int], ...]  # N into the attention and N into the MLP of each block, prefix included


def count(model: nn.Module, images: Tensor) -> Analytic:
    """Count the MACs of `model(images)` by running it once (meta tensors will do).

    model: of a family that `sparsify.nn.hosts` knows, dense or sparse, in eval mode; images: [B, C, H, W], counted together.
    """
    macs: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    tokens: list[tuple[int, int]] = []
    blocks = token_blocks(model)

    def hook(name: str) -> Any:
        def called(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not args:  # of constants alone, as a shared bias
                return
            if isinstance(module, hosts.BLOCKS):
                out = output[0] if isinstance(output, tuple) else output
                tokens.append((args[0].shape[1], out.shape[1]))
            found: dict[str, int] = {}
            if name in blocks:
                found = token_block(module, *args)
            elif isinstance(module, GraftedAttention):
                found = attention(module, args[0].shape[1])
            elif isinstance(module, projection.SUPPORTED):
                found = host_attention(module, args[0].shape[1])
            if found:
                B = args[0].shape[0]
                parts.update({part: B * m for part, m in found.items()})
                macs[name] += B * sum(found.values())
            else:
                macs[name] += layer(module, args[0], output)

        return called

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    pairs, predictor, tail, stages = (parts[part] for part in ("pairs", "predictor", "tail", "stages"))
    return Analytic(macs.total(), +macs, pairs, predictor, tail, stages, tuple(tokens))


def layer(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """MACs of a layer that is not a block's attention: input x, output y; 0 for what is elementwise or a container."""
    if isinstance(module, nn.Linear):  # rows [.., in] times weight [out, in]
        return x.numel() * module.weight.shape[0]
    if isinstance(module, nn.Conv2d):  # weight [out, in/groups, kh, kw] once for every output position
        positions = y.shape[-2] * y.shape[-1]
        standardised = 4 * module.weight.numel() if "StdConv" in type(module).__name__ else 0  # a norm of the weight
        return y.shape[0] * positions * module.weight.numel() + standardised
    if isinstance(module, nn.BatchNorm2d):
        return x.numel() * (1 if module.weight is None else 2)
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)) or "RmsNorm" in type(module).__name__:
        return x.numel() * (4 if module.weight is None else 5)  # fvcore's estimate for a norm
    if isinstance(module, AttentionPoolLatent):  # latent queries over all tokens: logits and values
        return x.shape[0] * module.latent.shape[1] * x.shape[1] * module.kv.weight.shape[0]
    return 0


def token_block(block: Any, x: Tensor, tokens: TokenState) -> dict[str, int]:
    """MACs of one image in a block with tokens x [B, N, C], submodules aside: attention, and the choice of its stage.

    `slices`: if only prefix tokens remain, the block projects the queries of P rows, and keys and values of all.
    """
    (_, N, C), P, stage = x.shape, block.prefix, block.stage
    patches = None if tokens.place is None else tokens.patches
    if stage is None:
        return attention(block.attn, N, patches)
    inner = int(block.attn.proj.weight.shape[1])  # H d
    n = N - P
    left = min(n, math.ceil(stage.share * tokens.patches - 1e-9))
    if left == 0:
        fused = block.attn.qkv is not None  # else q_proj, k_proj and v_proj are calls of their own
        return {"pairs": P * N * 2 * inner, "slices": (P + 2 * N) * C * inner if fused else 0}
    importance = (block.ranking_rows or 1) * N * inner  # logits of the rows that ask, or of the mean query
    if block.attn.importance is not None:
        importance = n * C * (4 + 1)  # fvcore's estimate for a norm, and one product
    pairs = 0
    if stage.way == "merge":  # in each round, 2r tokens search among all others for r merges, 256 at a time
        for before, after in itertools.pairwise([n, *rounds(n, left)]):
            looking = min(before - 1, 2 * (before - after))
            pairs += sum(min(256, looking - i) * (before - 1 - i) for i in range(0, looking, 256))
    return attention(block.attn, N, patches) | {"stages": importance + pairs * C}


def host_attention(module: Any, N: int) -> dict[str, int]:
    """MACs of timm's own attention over N tokens of one image: pairs, and qkv if its bias is the attention's."""
    width = module.proj.weight.shape[1]  # H d
    found = {"pairs": N * N * 2 * width}
    if getattr(module, "q_bias", None) is not None and not module.qkv_bias_separate:
        found["projection"] = N * module.qkv.weight.numel()
    return found


def attention(module: GraftedAttention, N: int, patches: int | None = None) -> dict[str, int]:
    """MACs of a block's attention over N tokens of one image alone; patches: of the grid, if some were dropped."""
    width, H = int(module.proj.weight.shape[1]), module.num_heads
    d = width // H
    if not isinstance(module, SparseAttention):
        return {"pairs": N * N * 2 * width}
    s = module.sparsity
    P = min(s.prefix, N)
    predictor, known, features = _predictor(module.predictor, H, N, P, d)
    pairs = tail = 0
    for h in range(H):
        b = min(N, max(1, math.ceil(s.keeps[h % len(s.keeps)] * N - 1e-9)))
        pairs += (P * N + (N - P) * b) * 2 * d - (N - P) * b * known[
            h
        ]  # `known`: what the predictor has done of a logit
        tail += _tail(s, h, N, P, d, features[h], patches)
    return {"pairs": pairs, "predictor": predictor, "tail": tail}


def _predictor(p: Predictor, H: int, N: int, P: int, d: int) -> tuple[int, Sequence[int], Sequence[int]]:
    """MACs of the scores of every patch query; products shared with a kept logit and features of a key, of each head."""
    if not isinstance(p, HeadLowrankPredictor | TokenLowrankPredictor):  # another class reports its own
        return p.macs(N, P), p.shared(H), p.compared(H, d)
    scores = H * (N - P) * N  # score entries
    if isinstance(p, HeadLowrankPredictor):
        coordinates = sum(p.ranks)
        if p.a_q is None or p.a_k is None:
            return (N - P) * N * coordinates, p.ranks, p.ranks
        return (N - P) * N * coordinates + 2 * N * d * coordinates, [0] * H, p.ranks
    r = p.w_down.shape[0]
    c, macs = d, 0
    if p.w_q is not None and p.w_k is not None:
        c = p.w_q.shape[0]
        macs += H * N * (p.w_q.numel() + p.w_k.numel())
    macs += H * r * N * c  # W_down k'
    macs += H * (N - P) * r * c  # q' K_down'
    return macs + scores * min(r, p.knobs["coef_topk"] or r), [0] * H, [d] * H


def _tail(s: Sparsity, h: int, N: int, P: int, d: int, features: int, patches: int | None) -> int:
    """In head h every patch row meets the mean key and mean value of every cell; `clusters` first finds the cells."""
    if not s.tail.stands_for_dropped_keys:
        return 0
    n, cells = N - P, 1
    if s.tail.name != "mean":
        whole = n if patches is None else patches
        grid = s.grid if s.grid[0] * s.grid[1] == whole else _other_grid(whole)
        grids = s.cells if patches is None else s.cells_of(N)
        asked = grids[h % len(grids)]
        cells = min(asked[0], grid[0]) * min(asked[1], grid[1]) if known(s.tail) else s.tail.count(grid, asked)
    search = LLOYD_STEPS * n * cells * features if s.tail.name == "clusters" else 0
    return n * (cells + P) * 2 * d + search


def _other_grid(n: int) -> tuple[int, int]:
    """An image of another size than the model's own: square if it can be, else one row of patches."""
    side = math.isqrt(n)
    return (side, side) if side * side == n else (1, n)
