"""Queries, keys and values to time attention on: of DeiT-Tiny on photographs, or random.

Speed depends on the numbers: how scores are spread decides how often the selection must look twice. Photographs run through
converted DeiT-Tiny (the default recipe at keep 0.1, 128 calibration photographs) at an image size that gives N tokens,
position embedding resampled; two images of 3 heads side by side make 6 heads, with the ranks that the conversion gave
them. Random tensors have key coordinates that decay, as folding makes them, and rank 16.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import NamedTuple, cast

import torch
from accuracy import DATA, WEIGHTS
from torch import Tensor

import sparsify
from sparsify.images import datasets
from sparsify.images.trainset import trainset
from sparsify.models import checkpoint
from sparsify.nn import attention, graft
from sparsify.nn.observe import observe
from sparsify.nn.predictor import HeadLowrankPredictor, TokenLowrankPredictor
from sparsify.recipe import load_recipe

BLOCKS = (2, 5, 8)  # of DeiT-Tiny's 12
PATCH, PREFIX, HEADS = 16, 1, 6
PAPER_IMAGES = 32  # calibration of the paper's predictor


class Activations(NamedTuple):
    """What one block's attention is given.

    Attributes:
        qkv: [B, N, 3, H, d] float32, as `qkv` writes it; the first r coordinates of q and k are the scores'.
        ranks: r of each head.
        w_down, w_up: of the paper's predictor, [r, N] and [H, r, N].
    """

    qkv: Tensor
    ranks: tuple[int, ...]
    w_down: Tensor
    w_up: Tensor


def grid_of(tokens: int) -> tuple[int, int]:
    """Patch grid of N tokens; N - 1 must be a square."""
    side = math.isqrt(tokens - PREFIX)
    if side < 1 or side * side + PREFIX != tokens:
        raise SystemExit(f"{tokens} tokens: expected one more than a square, such as 197, 577, 1370 or 4097")
    return side, side


def get(what: str, sizes: list[int], batch: int) -> dict[int, list[Activations]]:
    """Tokens -> activations of each block. `what`: random, photographs, or a file that `save` wrote."""
    if what == "random":
        return {tokens: [_random(tokens, batch)] for tokens in sizes}
    if what == "photographs":
        with tempfile.TemporaryDirectory() as folder:
            return _photographs(Path(folder), sizes, batch)
    saved = torch.load(what, weights_only=True)
    return {tokens: [Activations(*block) for block in saved[tokens]] for tokens in sizes}


def save(activations: dict[int, list[Activations]], path: Path) -> None:
    """Plain tensors, for another process."""
    torch.save({tokens: [tuple(block) for block in blocks] for tokens, blocks in activations.items()}, path)


def _random(tokens: int, batch: int, d: int = 64, rank: int = 16, paper_rank: int = 36) -> Activations:
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3, HEADS, d, generator=draw)
    qkv[:, :, 1] *= 3 * torch.exp(-torch.arange(d) / 8) + 0.3
    w_down = torch.randn(paper_rank, tokens, generator=draw).softmax(-1)
    return Activations(qkv, (rank,) * HEADS, w_down, torch.randn(HEADS, paper_rank, tokens, generator=draw))


def _photographs(folder: Path, sizes: list[int], batch: int) -> dict[int, list[Activations]]:
    files = {}
    for recipe, changes in (("calibrate", {}), ("paper-calibrated", {"calib_images": PAPER_IMAGES})):
        files[recipe] = folder / f"{recipe}.safetensors"
        chosen = load_recipe(recipe).override(keep=0.1, **changes)
        images = DATA / "imagenet-sample" / "train"
        sparsify.convert("deit_tiny", recipe=chosen, output=files[recipe], weights=WEIGHTS, data=images)
    return {tokens: _blocks(files, tokens, batch) for tokens in sizes}


def _blocks(files: dict[str, Path], tokens: int, batch: int) -> list[Activations]:
    side = PATCH * grid_of(tokens)[0]
    model, paper = (checkpoint.load(files[recipe], side) for recipe in ("calibrate", "paper-calibrated"))
    transform = datasets.transform(datasets.data_config(model))
    pairs = trainset(DATA / "imagenet-sample" / "val").calibration(2 * batch, 0, transform, batch_size=2)
    seen: dict[int, list[Tensor]] = {block: [] for block in BLOCKS}

    def keep(block: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        if block in seen:  # (2, 3, N, d) each -> (N, 3, 6, d)
            seen[block].append(torch.stack([q, k, v]).flatten(1, 2).permute(2, 0, 1, 3))

    observe(graft.dense_twin(model), pairs, keep)
    sparse, papers = (list(attention.sparse_modules(m).values()) for m in (model, paper))
    found = []
    for block in BLOCKS:
        ranks = cast(HeadLowrankPredictor, sparse[block].predictor).ranks
        predictor = cast(TokenLowrankPredictor, papers[block].predictor)
        w_down, w_up = predictor.w_down.detach(), predictor.basis().detach()
        found.append(Activations(torch.stack(seen[block]), (*ranks, *ranks), w_down, torch.cat([w_up, w_up])))
    return found
