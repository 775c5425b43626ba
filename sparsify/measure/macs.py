"""MACs of a model by fvcore, with a handle for every op that it meets.

fvcore traces one real forward pass of one image (under tracing, meta tensors fail in torch's own convolution).
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsify.nn import hosts
from sparsify.nn.attention import SparseAttention, sparse_modules
from sparsify.nn.token_models import token_blocks
from sparsify.ops.macs import HANDLES, PARTS

ELEMENTWISE = """
    add add_ sub rsub mul mul_ div div_ neg pow square sqrt rsqrt exp log mean sum amax ceil where softmax sigmoid
    sigmoid_ tanh gelu gelu_ silu silu_ mish relu6 hardtanh hardtanh_ hardswish hardswish_ leaky_relu elu softplus
    max_pool2d masked_fill_ pad clone alias lift_fresh repeat expand_as view_as reshape_as mT ones_like new_ones lt
    ge clamp_min linalg_vector_norm sort argsort gather scatter scatter_add embedding_bag searchsorted masked_fill
    sin cos meshgrid ne repeat_interleave _upsample_bicubic2d_aa upsample_bicubic2d _upsample_bilinear2d_aa index
    index_select stack avg_pool2d
""".split()
"""Ops of aten for sums, activations, comparisons, sorting, copies and position embeddings: 0 MACs, as in fvcore's
convention. Any other op without a handle is reported in `Counts.unsupported`."""

DENSE_OPS = ("scaled_dot_product_attention", "matmul")  # matmul: timm with TIMM_FUSED_ATTN=0


@dataclass(frozen=True)
class Counts:
    """MACs of one image."""

    total: int  # the whole model
    by_module: Mapping[str, int]  # inclusive count of every module, by name; '' is the model
    attention: Mapping[str, Mapping[str, int]]  # of every module named in `count`, by part: `PARTS`, `full` where dense
    stages: int  # importance and matching of the tokens, in all stages (`sparsify.nn.tokens`)
    # ops that were not counted, neither handled nor elementwise, and how often they occur
    unsupported: Mapping[str, int]

    def part(self, name: str) -> int:
        """Sum of one part over all attention modules."""
        return sum(parts.get(name, 0) for parts in self.attention.values())

    @property
    def mhsa(self) -> int:
        """The paper's 'MHSA': QK', AV, predictor and tail of all blocks, without qkv and output projections."""
        return sum(sum(parts.values()) for parts in self.attention.values())


def count(model: nn.Module, image: tuple[int, int, int], attention: list[str]) -> Counts:
    """Count the MACs of `model`, in eval mode, for one image of these channels, height and width.

    attention: names of the modules whose attention is the blocks' own (`Counts.attention`).
    """
    parameter = next(model.parameters())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore uses torch.jit, at its import too, which torch warns of
        from fvcore.nn import FlopCountAnalysis
        from fvcore.nn.jit_handles import norm_flop_counter

        analysis = FlopCountAnalysis(model, torch.zeros(1, *image, device=parameter.device, dtype=parameter.dtype))
        analysis.set_op_handle(**HANDLES, **{"aten::rms_norm": norm_flop_counter(2)})  # as fvcore counts layer_norm
        analysis.set_op_handle(**{f"aten::{op}": None for op in ELEMENTWISE})
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        operators = {name: Counter(found) for name, found in analysis.by_module_and_operator().items()}
    predictors = [f"{name}.predictor" for name in sparse_modules(model)]
    for name in predictors:
        _take_out(operators, name)
    blocks = token_blocks(model)
    for name, block in blocks.items():
        _give_to_submodules(operators, name, block)
    return Counts(
        total=int(operators[""].total()),
        by_module={name: int(found.total()) for name, found in operators.items()},
        attention={name: _parts(model.get_submodule(name), operators[name]) for name in attention},
        stages=int(sum(operators[f"{name}.stage"].total() for name in blocks if f"{name}.stage" in operators)),
        unsupported=dict(analysis.unsupported_ops() - sum(map(analysis.unsupported_ops, predictors), Counter())),
    )


def _take_out(operators: dict[str, Counter[str]], name: str) -> None:
    """Subtract what a predictor computes in PyTorch: the attention op counts it, by `Ranking.macs`."""
    own = operators[name].copy()
    parts = name.split(".")
    for i in range(len(parts) + 1):
        operators[".".join(parts[:i])].subtract(own)


def _give_to_submodules(operators: dict[str, Counter[str]], name: str, block: nn.Module) -> None:
    """Credit what a block of `nn.token_blocks` computes outside any submodule's call to the submodule that it belongs to.

    The importance is a matmul of the stage's, and a norm where it is fitted; linear layers are slices of `attn.qkv`
    (`GraftedAttention.prefix_rows`); everything else is the attention itself.
    """
    own = operators[name].copy()
    for child, _ in block.named_children():
        own.subtract(operators[f"{name}.{child}"])
    owners = {"matmul": ("stage",), "layer_norm": ("stage",), "linear": ("attn", "attn.qkv")}
    for op, macs in (+own).items():
        for owner in owners.get(op, ("attn",)):
            operators[f"{name}.{owner}"][op] += macs


def _parts(module: nn.Module, operators: Counter[str]) -> dict[str, int]:
    dense = sum(int(operators[op]) for op in DENSE_OPS)
    if not isinstance(module, SparseAttention):
        return {"full": dense}
    parts = {part: int(operators[part]) for part in PARTS}
    parts["prefix"] += dense  # the prefix rows alone are computed (`GraftedAttention.prefix_rows`)
    return parts


def replica(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy in eval mode whose tensors are on `device` and of `dtype`, without gradients; tensors that fit are shared."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to(device, dtype or p.dtype), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = b.detach().to(device, dtype if dtype and b.is_floating_point() else b.dtype)
    return copy.deepcopy(model, memo).eval()


def image_shape(model: nn.Module, img_size: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """Channels, height and width of the image that `model` takes; `img_size` (height, width) overrides its own."""
    convolution = next((m for m in hosts.embedding(model).modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if convolution is None else convolution.in_channels
    height, width = img_size or hosts.image_size(model)
    return channels, int(height), int(width)


def tree(
    sparse: nn.Module, counts: Counts, dense: nn.Module | None, dense_counts: Counts | None
) -> list[dict[str, Any]]:
    """Rows of the module tree in order of the modules, parents before children; see `Profile` for the keys.

    Left out are leaves that have neither parameters nor MACs (activations, dropout, identities), predictors excepted.
    """
    dense_modules = dict(dense.named_modules()) if dense is not None else {}
    predictors = {f"{name}.predictor": name for name in sparse_modules(sparse)}
    rows: list[dict[str, Any]] = []
    for name, module in sparse.named_modules():
        params = sum(p.numel() for p in module.parameters())
        macs_sparse = counts.by_module.get(name, 0)
        macs_dense = dense_counts.by_module.get(name, 0) if dense_counts is not None else None
        if name in predictors:  # its scores are computed inside the attention op, so fvcore credits the parent
            macs_sparse += counts.attention[predictors[name]]["predictor"]
        elif not params and not macs_sparse and not macs_dense:
            continue
        row = {
            "name": name,
            "depth": name.count(".") + 1 if name else 0,
            "type": _type(module),
            "type_dense": _type(dense_modules[name]) if name in dense_modules else None,
            "params": params,
            "macs_dense": macs_dense,
            "macs_sparse": macs_sparse,
        }
        if name in counts.attention:
            row |= {f"{part}_macs": counts.attention[name].get(part, 0) for part in (*PARTS, "full")}
            row["mhsa_macs_sparse"] = sum(counts.attention[name].values())
            row["mhsa_macs_dense"] = sum(dense_counts.attention[name].values()) if dense_counts is not None else None
        rows.append(row)
    return rows


def _type(module: nn.Module) -> str:
    """The name of its class; some classes go by a shorter one in `Profile.modules`."""
    name = type(module).__name__
    known = {"HeadLowrankPredictor": "HeadLowrank", "TokenLowrankPredictor": "TokenLowrank", "TokenStage": "Stage"}
    return known.get(name, name)
