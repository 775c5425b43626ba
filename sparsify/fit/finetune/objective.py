"""The training objective: outputs of teacher and student for some images, and the weighted loss terms between them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from sparsify import processes
from sparsify.files.outputs import whole
from sparsify.fit.finetune import losses
from sparsify.nn import attention, graft, hosts
from sparsify.nn.attention import SparseAttention
from sparsify.nn.observe import watching
from sparsify.nn.predictor import Reconstruction, TokenLowrankPredictor
from sparsify.nn.token_models import TokenModel
from sparsify.nn.tokens import TokenState
from sparsify.ops.spec import budget
from sparsify.recipe import Losses, Stage


class Outputs(NamedTuple):
    """What the losses read of a model; None or empty where no loss needs it."""

    logits: Tensor | None = None  # [B, classes], or pooled features of a model without a head
    patch: Tensor | None = None  # patch tokens after the final norm, [B, n0, C]
    # output of each block, [B, N0, C], and which of its patches are present, bool [B, n0] or None for all
    blocks: tuple[tuple[Tensor, Tensor | None], ...] = ()
    pairs: tuple[tuple[int, Tensor, Tensor], ...] = ()  # number, q and k [B, H, N, d] of each block


class Teacher:
    """The dense model, eval mode, without gradients: computes what `losses` weigh, and queries and keys if `pairs`."""

    def __init__(self, model: nn.Module, losses: Losses, pairs: bool) -> None:
        self.model, self.losses, self.pairs = model.eval(), losses, pairs

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Outputs:
        """Images [B, C, H, W] -> outputs; none are computed where no loss reads them."""
        if not (self.pairs or max(self.losses.logits, self.losses.tokens, self.losses.features) > 0):
            return Outputs()
        return _outputs(self.model, x, self.losses, self.pairs)[0]


class CachedTeacher:
    """Reads the teacher's outputs for each image from disk where it can: for stages that see every image in one form only.

    Files FOLDER/RANK-*.npy, float32, one row an image: classes and n0 C numbers (150 kB an image for DeiT-Tiny), of the
    losses `logits` and `tokens` only (`Stage` sees to that). A row is marked as present after it was written, so that a
    killed run leaves nothing half-written behind. `images`: number of training images; `folder`: of this stage.
    """

    def __init__(self, teacher: Teacher, images: int, folder: Path) -> None:
        self.teacher, self.images, self.folder = teacher, images, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, np.memmap] = {}
        self.present = self._rows("there", (), bool)
        weights = {"logits": teacher.losses.logits, "patch": teacher.losses.tokens}
        self.names = [name for name, weight in weights.items() if weight]

    def __call__(self, x: Tensor, index: Tensor) -> Outputs:
        """x [B, C, H, W], the images `index` [B] -> logits and patch tokens, float32 on the device of x."""
        rows = index.numpy()
        if not self.present[rows].all():
            outputs = self.teacher(x)
            for name in self.names:
                value = getattr(outputs, name)
                self._rows(name, tuple(value.shape[1:]))[rows] = value.float().cpu().numpy()
            self.present[rows] = True
        read = {name: torch.from_numpy(np.array(self._rows(name)[rows])).to(x.device) for name in self.names}
        return Outputs(read.get("logits"), read.get("patch"))

    def _rows(self, name: str, shape: tuple[int, ...] = (), dtype: type = np.float32) -> np.memmap:
        """The file of one output, made with zeros where it is missing; a row has that shape."""
        if name not in self.rows:
            path = self.folder / f"{processes.rank()}-{name}.npy"
            if not path.exists():
                with whole(path) as temporary:
                    open_memmap(temporary, "w+", dtype, (self.images, *shape)).flush()
                    if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not a SIGBUS later
                        with open(temporary, "rb+") as file:
                            os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
            self.rows[name] = open_memmap(path, "r+")
        return self.rows[name]


class Objective(nn.Module):
    """The sparse student and its losses: forward(x, y, teacher) -> the weighted losses by name, means over the images.

    A stage with `attention: dense` runs the student without sparsity and with all tokens. scale: see `Validator.scale`.
    """

    def __init__(self, student: nn.Module, stage: Stage, scale: float | None = None) -> None:
        super().__init__()
        self.student, self.stage, self.scale = student, stage, scale
        self.dense = graft.dense_twin(student) if stage.attention == "dense" else None  # over the same parameters

    def forward(self, x: Tensor, y: Tensor | None, teacher: Outputs) -> dict[str, Tensor]:
        """x [B, C, H, W]; y [B, classes] or None."""
        weights = self.stage.losses
        student, tokens = _outputs(self.dense or self.student, x, weights, weights.pairs)
        terms: dict[str, Tensor] = {}
        if weights.classification:
            terms["classification"] = losses.classification(cast(Tensor, student.logits), cast(Tensor, y))
        if weights.logits:
            logits = cast(Tensor, teacher.logits), cast(Tensor, student.logits)
            if not getattr(self.student, "num_classes", 0):
                terms["logits"] = losses.pooled(*logits)
            elif self.scale is not None:
                terms["logits"] = losses.outputs(*logits, self.scale)
            else:
                terms["logits"] = losses.kl(*logits, weights.temperature)
        if weights.tokens:
            patches = cast(Tensor, teacher.patch), cast(Tensor, student.patch)
            terms["tokens"] = losses.tokens(*patches, _present(tokens))
        if weights.features:
            prefix = hosts.num_prefix_tokens(self.student)
            blocks = zip(teacher.blocks, student.blocks, strict=True)
            errors = [losses.features(t, s, present, prefix) for (t, _), (s, present) in blocks]
            terms["features"] = torch.stack(errors).mean()
        if weights.pairs:
            with torch.autocast(x.device.type, enabled=False):  # small differences of large sums: float32
                terms |= self._attention(teacher, student)
        if weights.basis_l1:
            predictors = [module.predictor for module in attention.sparse_modules(self.student).values()]
            bases = [p.w_up for p in predictors if isinstance(p, TokenLowrankPredictor)]
            terms["basis_l1"] = torch.stack([w.abs().sum() for w in bases if w is not None]).sum()
        return {name: getattr(weights, name) * term for name, term in terms.items()}

    def _attention(self, teacher: Outputs, student: Outputs) -> dict[str, Tensor]:
        """The losses `attention` and `mass` of the predictors, means over the sparse blocks."""
        weights = self.stage.losses
        modules = list(attention.attention_modules(self.student).values())
        form = Reconstruction(weights.coefficients == "all", weights.basis == "raw")
        targets = {i: (q, k) for i, q, k in (teacher.pairs or student.pairs)}
        errors, lost = [], []
        for i, q, k in student.pairs:
            module = modules[i]
            if not isinstance(module, SparseAttention):
                continue
            keeps, prefix = module.sparsity.keeps, module.sparsity.prefix
            bias = hosts.position_bias(self.student, module)
            true = true_attention(*targets[i], module.scale, prefix, bias)
            estimate = module.predictor.reconstruct(q, k, module.scale, form, bias)[:, :, prefix:]
            if weights.attention:
                errors.append(losses.attention(estimate, true, weights.attention_form, weights.reference_batch))
            if weights.mass:
                lost.append(losses.lost_mass(estimate, true, [budget(keep, true.shape[-1]) for keep in keeps]))
        terms = {}
        if errors:
            terms["attention"] = losses.over_blocks(errors, weights.attention_blocks)
        if lost:
            terms["mass"] = torch.stack(lost).mean()
        return terms


@torch.no_grad()
def true_attention(q: Tensor, k: Tensor, scale: float, prefix: int, bias: Tensor | None = None) -> Tensor:
    """Dense attention of the patch queries: q, k [B, H, N, d], bias of the logits [1, H, N, N] or None -> float32
    [B, H, N - P, N], without a gradient."""
    logits = (q[:, :, prefix:].float() @ k.float().mT) * scale
    return (logits if bias is None else logits + bias[:, :, prefix:].float()).softmax(-1)


def _outputs(model: nn.Module, x: Tensor, weights: Losses, pairs: bool) -> tuple[Outputs, TokenState | None]:
    """The outputs of `model` that losses with these weights read, and its tokens after the last block where some leave.

    The hooks are gone when gradient checkpointing computes a block again.
    """
    outputs: list[Any] = []  # of each block
    heads: list[tuple[int, Tensor, Tensor]] = []  # number, q and k of each block
    prefix = hosts.num_prefix_tokens(model)
    with contextlib.ExitStack() as hooks:
        if weights.features:
            for block in cast(Any, model).blocks:
                hooks.callback(block.register_forward_hook(lambda module, args, out: outputs.append(out)).remove)
        if pairs:
            hooks.enter_context(watching(model, lambda i, q, k, v: heads.append((i, q, k))))
        full, read_by_head, tokens = _run(model, x)
    logits = cast(Any, model).forward_head(read_by_head) if weights.classification or weights.logits else None
    patch = full[:, prefix:] if weights.tokens else None
    blocks = tuple(_on_full_grid(output, prefix) for output in outputs)
    return Outputs(logits, patch, blocks, tuple(heads)), tokens


def _run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, TokenState | None]:
    """Normed tokens on the full grid, those that the model's own head reads, and which tokens are present (None: all)."""
    host = cast(Any, model)
    if not isinstance(model, TokenModel):
        features = host.forward_features(x)
        return features, features, None
    z, tokens = model.forward_tokens(x, True)
    full = host.norm(model.whole(z, tokens))
    return full, full if model.full_grid else host.norm(z), tokens


def _present(tokens: TokenState | None) -> Tensor | None:
    """The patches that were not dropped, bool [B, n0]; None: all."""
    return None if tokens is None or tokens.owner is None else tokens.owner >= 0


def _on_full_grid(output: Any, prefix: int) -> tuple[Tensor, Tensor | None]:
    """A block's output on the full grid, [B, N0, C], and which patches are present."""
    z, tokens = output if isinstance(output, tuple) else (output, None)
    if tokens is not None:
        z = torch.cat([z[:, :prefix], tokens.spread(z[:, prefix:])], 1)
    return z, _present(tokens)
