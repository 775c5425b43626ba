"""One training pass: what the teacher says of some images, and how far the student is from it, loss by loss."""

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
from sparsify.nn.token_models import TokensLeave
from sparsify.nn.tokens import TokenState
from sparsify.ops.spec import budget
from sparsify.recipe import Losses, Stage


class Said(NamedTuple):
    """What a model says of images; None or empty where no loss asks.

    Attributes:
        logits: [B, classes], or pooled features of a model without a head.
        patch: patch tokens behind the final norm, [B, n0, C].
        blocks: what each block gives, [B, N0, C], and which of its patches are still there, bool [B, n0] or None for all.
        pairs: q and k of each block that has a sparse attention, by its number, [B, H, N, d] each.
    """

    logits: Tensor | None = None
    patch: Tensor | None = None
    blocks: tuple[tuple[Tensor, Tensor | None], ...] = ()
    pairs: tuple[tuple[int, Tensor, Tensor], ...] = ()


class Teacher:
    """The dense model, eval mode, without gradients.

    Args:
        model: dense, on its device.
        wanted: whose losses decide what is computed.
        pairs: queries and keys are needed.
    """

    def __init__(self, model: nn.Module, wanted: Losses, pairs: bool) -> None:
        self.model, self.wanted, self.pairs = model.eval(), wanted, pairs

    @property
    def needed(self) -> bool:
        """Whether any loss looks at what the teacher says."""
        return self.pairs or max(self.wanted.logits, self.wanted.tokens, self.wanted.features) > 0

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Said:
        """Images [B, C, H, W] -> what it says of them."""
        if not self.needed:
            return Said()
        return _listen(self.model, x, self.wanted, self.pairs)[0]


class Lesson(nn.Module):
    """The student and its losses: forward(x, y, said) -> the weighted losses by name, scalars, means over the images.

    Args:
        student: sparse.
        stage: losses and what is trained. `attention: dense` runs the student without sparsity and with all tokens.
    """

    def __init__(self, student: nn.Module, stage: Stage) -> None:
        super().__init__()
        self.student, self.stage = student, stage
        self.dense = graft.dense_twin(student) if stage.attention == "dense" else None  # over the same parameters

    def forward(self, x: Tensor, y: Tensor | None, said: Said) -> dict[str, Tensor]:
        """x [B, C, H, W]; y [B, classes] or None; said: the teacher's."""
        wanted = self.stage.losses
        own, tokens = _listen(self.dense or self.student, x, wanted, wanted.pairs)
        parts: dict[str, Tensor] = {}
        if wanted.classification:
            parts["classification"] = wanted.classification * losses.classification(
                cast(Tensor, own.logits), cast(Tensor, y)
            )
        if wanted.logits:
            parts["logits"] = wanted.logits * self._logits(cast(Tensor, said.logits), cast(Tensor, own.logits))
        if wanted.tokens:
            error = losses.tokens(cast(Tensor, said.patch), cast(Tensor, own.patch), _present(tokens))
            parts["tokens"] = wanted.tokens * error
        if wanted.features:
            parts["features"] = wanted.features * self._features(said, own)
        if wanted.pairs:
            with torch.autocast(x.device.type, enabled=False):  # small differences of large sums: float32
                parts |= self._attention(said, own)
        if wanted.basis_l1:
            parts["basis_l1"] = wanted.basis_l1 * self._basis()
        return parts

    def _logits(self, teacher: Tensor, student: Tensor) -> Tensor:
        if getattr(self.student, "num_classes", 0):
            return losses.kl(teacher, student, self.stage.losses.temperature)
        return losses.pooled(teacher, student)

    def _features(self, said: Said, own: Said) -> Tensor:
        prefix = hosts.num_prefix_tokens(self.student)
        pairs = zip(said.blocks, own.blocks, strict=True)
        return torch.stack([losses.features(t, s, present, prefix) for (t, _), (s, present) in pairs]).mean()

    def _attention(self, said: Said, own: Said) -> dict[str, Tensor]:
        """The losses of the predictors' attentions, weighted, means over the sparse blocks."""
        wanted = self.stage.losses
        modules = list(attention.attention_modules(self.student).values())
        form = Reconstruction(wanted.coefficients == "all", wanted.basis == "raw")
        targets = {i: (q, k) for i, q, k in (said.pairs or own.pairs)}
        errors, lost = [], []
        for i, q, k in own.pairs:
            module = modules[i]
            if isinstance(module, SparseAttention):
                bias = hosts.position_bias(self.student, module)
                true = true_attention(*targets[i], module.scale, module.sparsity.prefix, bias)
                estimate = module.predictor.reconstruct(q, k, module.scale, form, bias)[:, :, module.sparsity.prefix :]
                if wanted.attention:
                    errors.append(losses.attention(estimate, true, wanted.attention_form, wanted.reference_batch))
                if wanted.mass:
                    b = budget(module.sparsity.keep, true.shape[-1])
                    lost.append(losses.lost_mass(estimate, true, b))
        parts = {}
        if errors:
            parts["attention"] = wanted.attention * losses.over_blocks(errors, wanted.attention_blocks)
        if lost:
            parts["mass"] = wanted.mass * torch.stack(lost).mean()
        return parts

    def _basis(self) -> Tensor:
        modules = attention.sparse_modules(self.student).values()
        bases = [m.predictor.w_up for m in modules if isinstance(m.predictor, TokenLowrankPredictor)]
        return torch.stack([w.abs().sum() for w in bases if w is not None]).sum()


@torch.no_grad()
def true_attention(q: Tensor, k: Tensor, scale: float, prefix: int, bias: Tensor | None = None) -> Tensor:
    """Dense attention of the patch queries: q, k [B, H, N, d], bias of the logits [1, H, N, N] or None -> float32
    [B, H, N - P, N], without a gradient."""
    logits = (q[:, :, prefix:].float() @ k.float().mT) * scale
    return (logits if bias is None else logits + bias[:, :, prefix:].float()).softmax(-1)


def _listen(model: nn.Module, x: Tensor, wanted: Losses, pairs: bool) -> tuple[Said, TokenState | None]:
    """What `model` says of x, as far as the losses want to know it, and what is known of its tokens where they leave.

    What listens computes nothing: it is gone when gradient checkpointing computes a block again.
    """
    outputs: dict[int, Any] = {}  # of the blocks
    heads: dict[int, tuple[Tensor, Tensor]] = {}  # q and k, by block
    prefix = hosts.num_prefix_tokens(model)
    hooks = [_keep(block, i, outputs) for i, block in enumerate(cast(Any, model).blocks)] if wanted.features else []
    listening = watching(model, lambda i, q, k, v: heads.update({i: (q, k)})) if pairs else contextlib.nullcontext()
    try:
        with listening:
            features, own, tokens = _run(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    seen = ((i, q, k) for i, (q, k) in heads.items())
    blocks = (_whole(out, prefix) for out in outputs.values())
    logits = None
    if wanted.classification or wanted.logits:
        logits = cast(Any, model).forward_head(own)
    patch = features[:, prefix:] if wanted.tokens else None
    return Said(logits, patch, tuple(blocks), tuple(seen)), tokens


def _run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, TokenState | None]:
    """Normed tokens on the full grid, those that the model's own head reads, and what is known of them."""
    host = cast(Any, model)
    if not isinstance(model, TokensLeave):
        features = host.forward_features(x)
        return features, features, None
    z, tokens = model.forward_tokens(x, True)
    full = host.norm(model.whole(z, tokens))
    return full, full if model.full_grid else host.norm(z), tokens


def _present(tokens: TokenState | None) -> Tensor | None:
    """The patches that were not dropped, bool [B, n0]; None: all."""
    return None if tokens is None or tokens.owner is None else tokens.owner >= 0


def _keep(module: nn.Module, key: int, found: dict[int, Any]) -> Any:
    """A hook that puts what `module` gives into `found`."""

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        found[key] = out

    return module.register_forward_hook(hook)


def _whole(out: Any, prefix: int) -> tuple[Tensor, Tensor | None]:
    """What a block gives on the full grid, [B, N0, C], and which patches are present."""
    z, tokens = out if isinstance(out, tuple) else (out, None)
    if tokens is not None:
        z = torch.cat([z[:, :prefix], tokens.spread(z[:, prefix:])], 1)
    return z, _present(tokens)


Forward = Callable[[Tensor, Tensor | None, Said], dict[str, Tensor]]
"""A `Lesson`, or what accelerate makes of it."""
