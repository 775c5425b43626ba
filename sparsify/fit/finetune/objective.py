"""The training objective: outputs of teacher and student for some images, and the weighted loss terms between them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

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
    """What the losses read of a model; None or empty where no loss needs it.

    Attributes:
        logits: [B, classes], or pooled features of a model without a head.
        patch: patch tokens after the final norm, [B, n0, C].
        blocks: output of each block, [B, N0, C], and which of its patches are present, bool [B, n0] or None for all.
        pairs: number, q and k [B, H, N, d] of each block.
    """

    logits: Tensor | None = None
    patch: Tensor | None = None
    blocks: tuple[tuple[Tensor, Tensor | None], ...] = ()
    pairs: tuple[tuple[int, Tensor, Tensor], ...] = ()


class Teacher:
    """The dense model, eval mode, without gradients.

    Args:
        model: dense, on its device.
        losses: their weights decide what is computed.
        pairs: whether queries and keys are needed.
    """

    def __init__(self, model: nn.Module, losses: Losses, pairs: bool) -> None:
        self.model, self.losses, self.pairs = model.eval(), losses, pairs

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Outputs:
        """Images [B, C, H, W] -> outputs; none are computed where no loss reads them."""
        if not (self.pairs or max(self.losses.logits, self.losses.tokens, self.losses.features) > 0):
            return Outputs()
        return _outputs(self.model, x, self.losses, self.pairs)[0]


class Objective(nn.Module):
    """The student and its losses: forward(x, y, teacher) -> the weighted losses by name, scalars, means over the images.

    Args:
        student: sparse.
        stage: losses and what is trained. `attention: dense` runs the student without sparsity and with all tokens.
    """

    def __init__(self, student: nn.Module, stage: Stage) -> None:
        super().__init__()
        self.student, self.stage = student, stage
        self.dense = graft.dense_twin(student) if stage.attention == "dense" else None  # over the same parameters

    def forward(self, x: Tensor, y: Tensor | None, teacher: Outputs) -> dict[str, Tensor]:
        """x [B, C, H, W]; y [B, classes] or None."""
        weights = self.stage.losses
        student, tokens = _outputs(self.dense or self.student, x, weights, weights.pairs)
        terms: dict[str, Tensor] = {}
        if weights.classification:
            terms["classification"] = losses.classification(cast(Tensor, student.logits), cast(Tensor, y))
        if weights.logits:
            terms["logits"] = self._logits(cast(Tensor, teacher.logits), cast(Tensor, student.logits))
        if weights.tokens:
            present = _present(tokens)
            terms["tokens"] = losses.tokens(cast(Tensor, teacher.patch), cast(Tensor, student.patch), present)
        if weights.features:
            terms["features"] = self._features(teacher, student)
        if weights.pairs:
            with torch.autocast(x.device.type, enabled=False):  # small differences of large sums: float32
                terms |= self._attention(teacher, student)
        if weights.basis_l1:
            terms["basis_l1"] = self._basis_l1()
        return {name: getattr(weights, name) * term for name, term in terms.items()}

    def _logits(self, teacher: Tensor, student: Tensor) -> Tensor:
        if getattr(self.student, "num_classes", 0):
            return losses.kl(teacher, student, self.stage.losses.temperature)
        return losses.pooled(teacher, student)

    def _features(self, teacher: Outputs, student: Outputs) -> Tensor:
        prefix = hosts.num_prefix_tokens(self.student)
        blocks = zip(teacher.blocks, student.blocks, strict=True)
        return torch.stack([losses.features(t, s, present, prefix) for (t, _), (s, present) in blocks]).mean()

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
            keep, prefix = module.sparsity.keep, module.sparsity.prefix
            bias = hosts.position_bias(self.student, module)
            true = true_attention(*targets[i], module.scale, prefix, bias)
            estimate = module.predictor.reconstruct(q, k, module.scale, form, bias)[:, :, prefix:]
            if weights.attention:
                errors.append(losses.attention(estimate, true, weights.attention_form, weights.reference_batch))
            if weights.mass:
                lost.append(losses.lost_mass(estimate, true, budget(keep, true.shape[-1])))
        terms = {}
        if errors:
            terms["attention"] = losses.over_blocks(errors, weights.attention_blocks)
        if lost:
            terms["mass"] = torch.stack(lost).mean()
        return terms

    def _basis_l1(self) -> Tensor:
        modules = attention.sparse_modules(self.student).values()
        bases = [m.predictor.w_up for m in modules if isinstance(m.predictor, TokenLowrankPredictor)]
        return torch.stack([w.abs().sum() for w in bases if w is not None]).sum()


Forward = Callable[[Tensor, Tensor | None, Outputs], dict[str, Tensor]]
"""An `Objective`, or what accelerate makes of it."""


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
    outputs: dict[int, Any] = {}  # by block
    heads: dict[int, tuple[Tensor, Tensor]] = {}  # q and k, by block
    prefix = hosts.num_prefix_tokens(model)
    with contextlib.ExitStack() as hooks:
        if weights.features:
            for i, block in enumerate(cast(Any, model).blocks):
                hooks.callback(_store_output(block, i, outputs).remove)
        if pairs:
            hooks.enter_context(watching(model, lambda i, q, k, v: heads.update({i: (q, k)})))
        full, read_by_head, tokens = _run(model, x)
    logits = None
    if weights.classification or weights.logits:
        logits = cast(Any, model).forward_head(read_by_head)
    patch = full[:, prefix:] if weights.tokens else None
    blocks = tuple(_on_full_grid(output, prefix) for output in outputs.values())
    return Outputs(logits, patch, blocks, tuple((i, q, k) for i, (q, k) in heads.items())), tokens


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


def _store_output(module: nn.Module, key: int, outputs: dict[int, Any]) -> Any:
    """A hook that stores the output of `module` under `key`."""

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        outputs[key] = out

    return module.register_forward_hook(hook)


def _on_full_grid(output: Any, prefix: int) -> tuple[Tensor, Tensor | None]:
    """A block's output on the full grid, [B, N0, C], and which patches are present."""
    z, tokens = output if isinstance(output, tuple) else (output, None)
    if tokens is not None:
        z = torch.cat([z[:, :prefix], tokens.spread(z[:, prefix:])], 1)
    return z, _present(tokens)
