"""timm's models with token stages: a `TokenState` is passed along with x.

`install` changes the classes of a model and its blocks to the subclasses below, in place; parameters, their names and
everything else stay timm's. `remove` restores the classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from timm.layers import PatchEmbed
from timm.models._features import feature_take_indices
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsify.errors import UsageError, field
from sparsify.nn import token_blocks as blocks_
from sparsify.nn.hosts import num_prefix_tokens, ranking_rows
from sparsify.nn.token_blocks import AnyTokenBlock
from sparsify.nn.tokens import TokenStage, TokenState


class TokenModel(nn.Module):
    """A timm model whose blocks map x and `TokenState` to both."""

    merging: bool  # some stage merges tokens
    emptied: bool  # some stage drops all patch tokens
    track_owners: bool  # `TokenState.owner` is needed inside (token-lowrank predictors)
    blocks: nn.Sequential
    patch_embed: PatchEmbed
    norm: nn.Module
    num_prefix_tokens: int
    num_classes: int
    grad_checkpointing: bool

    @property
    def pools_token(self) -> bool:
        """Whether the head uses the cls token."""
        return bool(self.global_pool == "token")

    @property
    def reads_prefix(self) -> bool:
        """Whether only a classifier on prefix tokens uses the output."""
        pooled = self.num_prefix_tokens > 0 and self.pools_token and getattr(self, "attn_pool", None) is None
        return pooled and self.num_classes > 0

    @property
    def full_grid(self) -> bool:
        """The default of `forward_features`."""
        return self.num_classes == 0 or (not self.reads_prefix and (self.merging or self.emptied))

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, full_grid: bool | None = None
    ) -> Tensor:
        """Normed tokens of images x [B, C, H, W].

        Args:
            full_grid: True: [B, P + n0, C], every patch with the features of the token that it is part of, or, if dropped,
                its last ones. False: [B, P + n, C], the remaining tokens. None: the remaining tokens for a classifier that
                uses prefix tokens only, or if no stage merges tokens or drops all patch tokens; else the full grid.

        Raises:
            NotImplementedError: attn_mask or is_causal: masks are not defined for removed tokens.
        """
        _refuse_masks(attn_mask, is_causal)
        full = self.full_grid if full_grid is None else full_grid
        x, tokens = self.forward_tokens(x, full)
        return self.norm(self.whole(x, tokens) if full else x)

    def forward_tokens(self, x: Tensor, full: bool) -> tuple[Tensor, TokenState]:
        """Images [B, C, H, W] -> the remaining tokens before the final norm, [B, P + n, C], and their state.

        full: track every patch, for the full grid (`TokenState.owner`, `TokenState.seen`).
        """
        x, tokens = self.start(x, full)
        for block in cast(Sequence[AnyTokenBlock], self.blocks):
            x, tokens = self.run_block(block, x, tokens)
        return x, tokens

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As timm's, always on the full grid (`forward_features`)."""
        _refuse_masks(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt '{output_fmt}': expected NCHW or NLC")
        selected, last = feature_take_indices(len(self.blocks), indices)
        P, grid = self.num_prefix_tokens, self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        x, tokens = self.start(x, True)
        prefix, patch = [], []
        for i, block in enumerate(cast(Sequence[AnyTokenBlock], self.blocks)):
            if stop_early and i > last:
                break
            x, tokens = self.run_block(block, x, tokens)
            if i in selected:
                y = self.whole(x, tokens)  # (B, P + n0, C)
                y = self.norm(y) if norm else y
                prefix.append(y[:, :P])
                patch.append(y[:, P:])
        if output_fmt == "NCHW":
            patch = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patch]
        final = None if intermediates_only else self.norm(self.whole(x, tokens))
        with_prefix = P > 0 and return_prefix_tokens
        if output_dict:
            outputs: dict[str, Any] = {"image_intermediates": patch}
            outputs |= {"image_intermediates_prefix": prefix} if with_prefix else {}
            return outputs if final is None else outputs | {"image_features": final}
        intermediates: Any = list(zip(patch, prefix, strict=True)) if with_prefix else patch
        return intermediates if final is None else (final, intermediates)

    def start(self, x: Tensor, full: bool) -> tuple[Tensor, TokenState]:
        """Images [B, C, H, W] to the first block's input [B, P + n0, C] and its state; full: see `forward_tokens`."""
        x, rope, bias = self.embedded(x)  # (B, P + n0, C)
        patch = x[:, self.num_prefix_tokens :]
        owner = None
        if full or self.track_owners:
            owner = torch.arange(patch.shape[1], device=x.device).expand(x.shape[0], -1)  # (B, n0)
        return x, TokenState(patch.shape[1], owner=owner, seen=patch if full else None, rope=rope, bias=bias)

    def embedded(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Images [B, C, H, W] to the first block's input [B, P + n0, C], `TokenState.rope` and `TokenState.bias`."""
        raise NotImplementedError

    def run_block(self, block: AnyTokenBlock, x: Tensor, tokens: TokenState) -> tuple[Tensor, TokenState]:
        """Run one block, with gradient checkpointing if it is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return cast(tuple[Tensor, TokenState], checkpoint(block, x, tokens, use_reentrant=False))
        return block(x, tokens)

    def whole(self, x: Tensor, tokens: TokenState) -> Tensor:
        """Tokens [B, P + n, C] on the full grid, [B, P + n0, C]."""
        P = self.num_prefix_tokens
        return torch.cat([x[:, :P], tokens.spread(x[:, P:])], 1)


class FewerTokens(TokenModel, VisionTransformer):  # type: ignore[misc]
    """timm's `VisionTransformer`."""

    def embedded(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x)))), None, None


class FewerTokensDistilled(FewerTokens, VisionTransformerDistilled):
    """DeiT's model with a distillation token."""


class FewerTokensEva(TokenModel, Eva):  # type: ignore[misc]
    """timm's `Eva`."""

    def embedded(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.training and self.patch_drop is not None:
            raise NotImplementedError("patch dropout is not defined where tokens are removed: set patch_drop_rate=0")
        x, rope = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(x), rope, None


class FewerTokensBeit(TokenModel, Beit):  # type: ignore[misc]
    """timm's `Beit`."""

    @property
    def pools_token(self) -> bool:
        return self.global_pool not in ("", "avg")

    def embedded(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
        x = self.pos_drop(x if self.pos_embed is None else x + self.pos_embed)
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()  # ([1,] H, N, N)
        return x, None, bias if bias is None or bias.ndim == 4 else bias.unsqueeze(0)


MODELS: dict[type, type] = {
    VisionTransformer: FewerTokens,
    VisionTransformerDistilled: FewerTokensDistilled,
    Eva: FewerTokensEva,
    Beit: FewerTokensBeit,
}
HOSTS = blocks_.HOSTS | MODELS


def check_host(model: nn.Module) -> None:
    """Raise `UsageError` if `model` does not support token stages."""
    if type(model) not in MODELS and not isinstance(model, TokenModel):
        without = f"convert without {field('token_keep')}"
        raise UsageError(f"fewer tokens are not supported for a {type(model).__name__}: {without}")


def install(model: nn.Module, way: str, shares: Sequence[float | None], track_owners: bool) -> None:
    """Install stages in `model`, in place; all its attention is grafted.

    Args:
        way, shares: of the stage of each block (`TokenStage`); None: a block without one.
        track_owners: see `TokenModel`.

    Raises:
        UsageError: see `check_host`.
    """
    check_host(model)
    blocks = cast(Sequence[nn.Module], model.blocks)
    prefix, rows = num_prefix_tokens(model), ranking_rows(model)
    for number, (block, share) in enumerate(zip(blocks, shares, strict=True)):
        block.__class__ = HOSTS[type(block)]
        token_block = cast(Any, block)
        token_block.stage = None if share is None else TokenStage(way, share, prefix)
        token_block.number, token_block.prefix, token_block.ranking_rows = number, prefix, rows
    model.__class__ = HOSTS[type(model)]
    host = cast(Any, model)
    host.merging, host.emptied, host.track_owners = way == "merge", 0 in shares, track_owners


def remove(model: nn.Module) -> None:
    """Restore timm's own classes, in place; attention does not change."""
    originals = {ours: host for host, ours in HOSTS.items()}
    for module in [model, *cast(Sequence[nn.Module], model.blocks)]:
        if type(module) in originals:
            module.__class__ = originals[type(module)]
            for name in "stage number prefix ranking_rows merging emptied track_owners".split():
                if name in module._modules or name in module.__dict__:
                    delattr(module, name)


def stages(model: nn.Module) -> Iterator[tuple[int, TokenStage]]:
    """The stages of a model and their block numbers, counted from 0."""
    for i, block in enumerate(cast(Sequence[nn.Module], model.blocks)):
        if isinstance(block, AnyTokenBlock) and block.stage is not None:
            yield i, block.stage


def token_blocks(model: nn.Module) -> dict[str, AnyTokenBlock]:
    """The blocks of a model that use `TokenState`, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AnyTokenBlock)}


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise NotImplementedError(
            "attention masks are not defined where tokens are removed: convert without token stages"
        )
