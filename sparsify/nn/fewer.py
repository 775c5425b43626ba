"""timm's blocks and models where tokens leave on the way: what is known of the tokens travels beside them.

`install` turns a model's own blocks and the model itself into the subclasses below, in place: parameters, names and
everything else stay timm's. `remove` turns them back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsify.nn.attention import GraftedAttention
from sparsify.nn.tokens import Stage, Tokens, importance


class _TokenBlock(nn.Module):
    """A block that takes and gives `Tokens`; its stage, if it has one, stands between attention and MLP.

    Attributes:
        stage: or None.
        prefix: P; ranking_rows: see `importance`.
    """

    attn: GraftedAttention
    stage: Stage | None
    prefix: int
    ranking_rows: int

    def before(self, x: Tensor) -> Tensor:
        """The attention's input."""
        raise NotImplementedError

    def added(self, out: Tensor) -> Tensor:
        """What is added to the residual stream, of the attention's output."""
        raise NotImplementedError

    def after(self, x: Tensor) -> Tensor:
        """x [B, N, C] with what the MLP adds."""
        raise NotImplementedError

    def forward(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tokens]:
        """x [B, N, C] -> [B, N or fewer, C], and what is known of them."""
        P, h, stage = self.prefix, self.before(x), self.stage
        if stage is not None and stage.count(x.shape[1] - P, tokens.patches) == 0:  # nobody reads the patch rows
            out = self.added(self.attn.prefix_rows(h, P, tokens))
            x, tokens = stage.drop_all(x, tokens)
            return self.after(x + out), tokens
        q, k, v = self.attn.qkv_heads(h)
        x = x + self.added(self.attn.close(self.attn.attend(q, k, v, None, tokens), h))
        if stage is not None:
            given = importance(q, k, self.attn.scale, tokens.size, self.ranking_rows, P)  # (B, n)
            x, tokens = stage(x, given, tokens)
        return self.after(x), tokens


class TokenBlock(_TokenBlock, Block):  # type: ignore[misc]
    """timm's `Block`, its norms before attention and MLP."""

    def before(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def added(self, out: Tensor) -> Tensor:
        return self.drop_path1(self.ls1(out))

    def after(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class TokenResPostBlock(_TokenBlock, ResPostBlock):  # type: ignore[misc]
    """timm's `ResPostBlock`, its norms behind attention and MLP."""

    def before(self, x: Tensor) -> Tensor:
        return x

    def added(self, out: Tensor) -> Tensor:
        return self.drop_path1(self.norm1(out))

    def after(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class FewerTokens(VisionTransformer):
    """A VisionTransformer of `TokenBlock`s.

    Attributes:
        merging, emptied: tokens merge somewhere; a stage lets all patch tokens leave.
        follow: owners of the patches are needed inside (token-lowrank predictors).
    """

    merging: bool
    emptied: bool
    follow: bool

    @property
    def reads_prefix(self) -> bool:
        """Whether nothing but a classifier over prefix tokens reads the output."""
        pooled = self.num_prefix_tokens > 0 and self.global_pool == "token" and self.attn_pool is None
        return pooled and self.num_classes > 0

    @property
    def full_grid(self) -> bool:
        """What `forward_features` gives when it is not told: see there."""
        return self.num_classes == 0 or (not self.reads_prefix and (self.merging or self.emptied))

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, full_grid: bool | None = None
    ) -> Tensor:
        """Normed tokens of images x [B, C, H, W].

        Args:
            full_grid: True: [B, P + n0, C], every patch with the features of the token that it went into, or, where it
                was dropped, with those it had when it was last seen. False: [B, P + n, C], the tokens that are left. None:
                the model's own: left ones where a classifier reads prefix tokens only, or where none merged and some are
                left; else full.

        Raises:
            NotImplementedError: attn_mask or is_causal: masks over tokens that leave are not defined.
        """
        _refuse_masks(attn_mask, is_causal)
        full = self.full_grid if full_grid is None else full_grid
        x, tokens = self.forward_tokens(x, full)
        return self.norm(self.whole(x, tokens) if full else x)

    def forward_tokens(self, x: Tensor, full: bool) -> tuple[Tensor, Tokens]:
        """Images [B, C, H, W] -> the tokens that are left, before the final norm, [B, P + n, C], and what is known of them.

        Args:
            full: keep track of where every patch went (`Tokens.owner`, `Tokens.seen`).
        """
        x, tokens = self.start(x, full)
        for block in cast(Sequence[_TokenBlock], self.blocks):
            x, tokens = self.through(block, x, tokens)
        return x, tokens

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, return_prefix_tokens: bool = False, norm: bool = False,
        stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False, output_dict: bool = False,
        attn_mask: Tensor | None = None, is_causal: bool = False,
    ) -> Any:  # fmt: skip
        """As timm's, always on the full grid (`forward_features`)."""
        _refuse_masks(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt '{output_fmt}': expected NCHW or NLC")
        taken, last = feature_take_indices(len(self.blocks), indices)
        height, width = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
        x, tokens = self.start(x, True)
        found: list[Tensor] = []
        for i, block in enumerate(cast(Sequence[_TokenBlock], self.blocks)):
            if stop_early and i > last:
                break
            x, tokens = self.through(block, x, tokens)
            if i in taken:
                whole = self.whole(x, tokens)  # (B, P + n0, C)
                found.append(self.norm(whole) if norm else whole)
        P = self.num_prefix_tokens
        prefix, patch = [y[:, :P] for y in found], [y[:, P:] for y in found]
        if output_fmt == "NCHW":
            patch = [y.transpose(1, 2).unflatten(2, (height, width)).contiguous() for y in patch]
        final = None if intermediates_only else self.norm(self.whole(x, tokens))
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": patch}
            named |= {"image_intermediates_prefix": prefix} if P and return_prefix_tokens else {}
            return named if final is None else named | {"image_features": final}
        result: Any = list(zip(patch, prefix, strict=True)) if P and return_prefix_tokens else patch
        return result if final is None else (final, result)

    def start(self, x: Tensor, full: bool) -> tuple[Tensor, Tokens]:
        """Images [B, C, H, W] to the first block's input [B, P + n0, C]; `full`: the full grid will be asked for."""
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))  # (B, P + n0, C)
        patch = x[:, self.num_prefix_tokens :]
        owner = None
        if full or self.follow:
            owner = torch.arange(patch.shape[1], device=x.device).expand(x.shape[0], -1)  # (B, n0)
        return x, Tokens(patch.shape[1], owner=owner, seen=patch if full else None)

    def through(self, block: _TokenBlock, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tokens]:
        """One block, with gradient checkpointing where it is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return cast(tuple[Tensor, Tokens], checkpoint(block, x, tokens, use_reentrant=False))
        return block(x, tokens)

    def whole(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Tokens [B, P + n, C] on the full grid: [B, P + n0, C]."""
        P = self.num_prefix_tokens
        return torch.cat([x[:, :P], tokens.spread(x[:, P:])], 1)


class FewerTokensDistilled(FewerTokens, VisionTransformerDistilled):
    """DeiT's model with a distillation token."""


HOSTS: dict[type, type] = {
    Block: TokenBlock,
    ResPostBlock: TokenResPostBlock,
    VisionTransformer: FewerTokens,
    VisionTransformerDistilled: FewerTokensDistilled,
}


def install(model: nn.Module, way: str, shares: Sequence[float | None], follow: bool) -> None:
    """Stages into `model`, in place; all its attention is grafted.

    Args:
        way, shares: of the stage of each block (`Stage`); None: a block without one.
        follow: see `FewerTokens`.
    """
    blocks = cast(Sequence[nn.Module], model.blocks)
    prefix = int(cast(int, model.num_prefix_tokens))
    rows = ranking_rows(model)
    for block, share in zip(blocks, shares, strict=True):
        block.__class__ = HOSTS[type(block)]
        token_block = cast(Any, block)
        token_block.stage = None if share is None else Stage(way, share, prefix)
        token_block.prefix, token_block.ranking_rows = prefix, rows
    model.__class__ = HOSTS[type(model)]
    host = cast(Any, model)
    host.merging, host.emptied, host.follow = way == "merge", 0 in shares, follow


def ranking_rows(model: nn.Module) -> int:
    """Leading tokens whose attention ranks the others: cls and distillation; 0 where there is none (`importance`)."""
    return 0 if getattr(model, "cls_token", None) is None else 1 + hasattr(model, "dist_token")


def remove(model: nn.Module) -> None:
    """timm's own classes again, in place; attention stays as it is."""
    own = {ours: host for host, ours in HOSTS.items()}
    for module in [model, *cast(Sequence[nn.Module], model.blocks)]:
        if type(module) in own:
            module.__class__ = own[type(module)]
            for name in ("stage", "prefix", "ranking_rows", "merging", "emptied", "follow"):
                if name in module._modules or name in module.__dict__:
                    delattr(module, name)


def stages(model: nn.Module) -> Iterator[tuple[int, Stage]]:
    """The stages of a model with the numbers of their blocks, counted from 0."""
    for i, block in enumerate(cast(Sequence[nn.Module], model.blocks)):
        stage = getattr(block, "stage", None)
        if isinstance(stage, Stage):
            yield i, stage


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise NotImplementedError("attention masks are not defined where tokens leave: convert without --token-keep")
