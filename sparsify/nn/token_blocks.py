"""timm's blocks with token stages: each maps x and `TokenState` to both, its stage between attention and MLP."""

from __future__ import annotations

from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from sparsify.nn import projection
from sparsify.nn.attention import GraftedAttention
from sparsify.nn.importance import fitted, given
from sparsify.nn.tokens import TokenStage, TokenState


class AnyTokenBlock(nn.Module):
    """A block that takes and gives `TokenState`; its stage, if it has one, stands between attention and MLP.

    Attributes:
        stage: or None.
        number: of the block, counted from 0.
        prefix: P; ranking_rows: see `importance.asked`.
    """

    attn: GraftedAttention
    norm1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module
    stage: TokenStage | None
    number: int
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

    def forward(self, x: Tensor, tokens: TokenState) -> tuple[Tensor, TokenState]:
        """x [B, N, C] -> [B, N or fewer, C], and what is known of them."""
        P, stage = self.prefix, self.stage
        bias = self.bias(tokens)
        if stage is not None and stage.count(x.shape[1] - P, tokens.patches) == 0:  # nobody reads the patch rows
            out = self.added(self.attn.prefix_rows(self.before(x), P, tokens, tokens.rope_of(self.number), bias))
            x, tokens = stage.drop_all(x, tokens)
            return self.after(x + out), tokens
        x, q, k, _ = self.attended(x, tokens, bias)
        if stage is not None:
            x, tokens = stage(x, self.importance(x, q, k, tokens, bias), tokens)
        return self.after(x), tokens

    def bias(self, tokens: TokenState) -> Tensor | None:
        """What is added to the logits by place, [B or 1, H, N, N]."""
        return tokens.bias_of(projection.position_bias(self.attn, tokens.bias), self.prefix)

    def attended(self, x: Tensor, tokens: TokenState, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The residual stream behind the attention, [B, N, C], and its q, k and v, [B, H, N, d] each."""
        h = self.before(x)
        q, k, v = self.attn.qkv_heads(h, tokens.rope_of(self.number))
        return x + self.added(self.attn.close(self.attn.attend(q, k, v, bias, tokens), h)), q, k, v

    def importance(self, x: Tensor, q: Tensor, k: Tensor, tokens: TokenState, bias: Tensor | None) -> Tensor:
        """I of the patch tokens, [B, n]: x [B, N, C] behind the attention, its q and k [B, H, N, d]."""
        P, weights = self.prefix, self.attn.importance
        if weights is not None:
            return fitted(x[:, P:], weights, None if tokens.size is None else tokens.size[:, P:])
        return given(q, k, self.attn.scale, tokens.size, self.ranking_rows, P, bias)


class TokenBlock(AnyTokenBlock, Block):  # type: ignore[misc]
    """timm's `Block`, its norms before attention and MLP."""

    def before(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def added(self, out: Tensor) -> Tensor:
        return self.drop_path1(self.ls1(out))

    def after(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class _NormedBehind(AnyTokenBlock):
    """Norms behind attention and MLP."""

    def before(self, x: Tensor) -> Tensor:
        return x

    def added(self, out: Tensor) -> Tensor:
        return self.drop_path1(self.norm1(out))

    def after(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class TokenResPostBlock(_NormedBehind, ResPostBlock):  # type: ignore[misc]
    """timm's `ResPostBlock`."""


class _ScaledByGamma(AnyTokenBlock):
    """Norms before attention and MLP, and LayerScale as bare parameters."""

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def before(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def added(self, out: Tensor) -> Tensor:
        return self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out)

    def after(self, x: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x))
        return x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class TokenEvaBlock(_ScaledByGamma, EvaBlock):  # type: ignore[misc]
    """timm's `EvaBlock`."""


class TokenBeitBlock(_ScaledByGamma, BeitBlock):  # type: ignore[misc]
    """timm's `Block` of Beit."""


class TokenEvaBlockPostNorm(_NormedBehind, EvaBlockPostNorm):  # type: ignore[misc]
    """timm's `EvaBlockPostNorm`."""


HOSTS: dict[type, type] = {
    Block: TokenBlock,
    ResPostBlock: TokenResPostBlock,
    EvaBlock: TokenEvaBlock,
    EvaBlockPostNorm: TokenEvaBlockPostNorm,
    BeitBlock: TokenBeitBlock,
}
"""timm's class -> the one of the same parameters where tokens may leave."""
