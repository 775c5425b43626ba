"""Whole models of `gpu.py`: dense beside fewer tokens, random weights, eager and from CUDA graphs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import gpu_predictions as predicted
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from sparsify.config import SparsityConfig, Tokens
from sparsify.nn import graft, guard, token_models
from sparsify.nn.cuda_graphs import Graphed
from sparsify.ops import attention


class Case(NamedTuple):
    """A model at some batches.

    macs: the share of the dense model's MACs to come closest to; None: token keep 0.7. settings: of timm's constructor.
    """

    name: str
    architecture: str
    side: int
    batches: tuple[int, ...]
    macs: float | None
    settings: tuple[tuple[str, int], ...] = ()


CASES = (
    Case("DeiT-S", "deit_small_patch16_224", 224, (1, 8, 64, 256), 0.4),
    Case("ViT-B", "vit_base_patch16_224", 224, (1, 8, 64), 0.4),
    Case("ViT-S/14 518", "vit_small_patch14_dinov2", 518, (1, 8), None),
)
TOYS = (Case("toy", "deit_tiny_patch16_224", 48, (1,), None, (("depth", 4), ("embed_dim", 48), ("num_heads", 3))),)


def timed(case: Case, run: Any) -> Iterator[dict[str, Any]]:
    """A row for each form of a case, at each batch."""
    torch.manual_seed(0)
    dense = timm.create_model(case.architecture, img_size=case.side, **dict(case.settings)).eval().requires_grad_(False)
    keep, share = chosen(dense, case)
    sparse = converted(dense, keep).to(run.device, run.dtype)
    dense = dense.to(run.device, run.dtype)
    for batch in case.batches:
        if run.late(10):
            return
        images = torch.randn(batch, 3, case.side, case.side).to(run.device, run.dtype)
        best: dict[str, float] = {}
        for form, which, call, graph in forms(dense, sparse, images, run.toy):
            try:
                ms = run.ms(call, 1, graph)
            except RuntimeError as error:
                yield {"model": case.name, "batch": batch, "form": form, "error": str(error).splitlines()[0][:80]}
                continue
            how = "eager" if "eager" in form else "graph"
            if which == "dense":
                best[how] = min(ms, best.get(how, ms))
            row: dict[str, Any] = {"model": case.name, "batch": batch, "form": form, "ms": ms}
            if which != "dense" and how in best:
                row |= {"macs": share, "faster_than_dense": best[how] / ms, **expected(case, run.card, batch, form)}
            yield row


def forms(
    dense: nn.Module, sparse: nn.Module, images: Tensor, toy: bool
) -> Iterator[tuple[str, str, Callable[[], object], bool]]:
    """Form, whose it is, a call, and whether it is to be captured; the dense ones first.

    `load, graph` is a model as `sparsify.load(graph=True)` gives it, which replays graphs by itself.
    """
    yield "dense, eager", "dense", partial(dense, images), False
    if not toy:
        for path in ("sdpa", *attention.SDPA):
            yield f"dense, graph, {path}", "dense", partial(by, path, dense, images), True
    yield "tokens, eager", "tokens", partial(sparse, images), False
    if not toy:
        yield "tokens, graph", "tokens", partial(sparse, images), True
        loaded = graft.shared_copy(sparse)
        guard.set_backend(loaded, "auto", graph=True)
        yield "load, graph", "tokens", partial(Graphed(loaded, dense_allowed=True), images), False


def by(path: str, model: nn.Module, images: Tensor) -> Tensor:
    """A forward pass whose attention is one of torch's kernels."""
    with sdpa_kernel(attention.SDPA[path]) if path in attention.SDPA else contextlib.nullcontext():
        return model(images)


def expected(case: Case, card: str, batch: int, form: str) -> dict[str, float | None]:
    """Prediction and bar of a form."""
    if form == "load, graph":
        return {"predicted": None, "bar": predicted.LOADED_BAR}
    if form != "tokens, graph":
        return {"predicted": None, "bar": None}
    found = predicted.MODELS.get((card, case.name), {}).get(batch)
    return {"predicted": found, "bar": predicted.BARS.get((case.name, batch)) if card == "H200" else None}


def converted(dense: nn.Module, keep: float) -> nn.Module:
    """Dense attention over fewer tokens, merged; weights of the importance are random, which does not change the time."""
    model = graft.graft(graft.shared_copy(dense), SparsityConfig(keep="dense", tokens=Tokens(keep=keep)))
    for name, weights in model.named_buffers():
        if name.endswith("attn.importance"):
            weights.copy_(torch.randn(weights.shape) / 8)
    return model.eval().requires_grad_(False)


def chosen(dense: Any, case: Case) -> tuple[float, float]:
    """Token keep of a case, and the share of the dense model's MACs that it takes."""
    keeps = (0.7,) if case.macs is None else tuple(0.3 + 0.02 * i for i in range(15))
    shares = {keep: macs(converted(dense, keep)) / macs(dense) for keep in keeps}
    keep = min(shares, key=lambda keep: abs(shares[keep] - (case.macs or 0)))
    return keep, shares[keep]


def macs(model: Any) -> int:
    """Theoretical MACs of the blocks for one image; the rest is the same with fewer tokens, and small.

    For n tokens of width C a block's attention takes 4 C^2 n + 2 C n^2, its MLP 8 C^2 for each token that is left.
    """
    patches, width = model.patch_embed.num_patches, model.embed_dim
    left = {i: math.ceil(stage.share * patches - 1e-9) for i, stage in token_models.stages(model)}
    n, total = patches, 0
    for i in range(len(model.blocks)):
        total += 4 * width**2 * n + 2 * width * n**2
        n = left.get(i, n)
        total += 8 * width**2 * n
    return total
