"""timm's blocks with token stages between attention and MLP."""

from __future__ import annotations

from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from sparsify.nn import projection
from sparsify.nn.attention import GraftedAttention
from sparsify.nn.importance import attention_importance, fitted_importance
from sparsify.nn.tokens import TokenStage, TokenState


class AnyTokenBlock(nn.Module):
    """A block that maps x and `TokenState` to both. Here with norms before attention and MLP, as in timm's `Block`."""

    attn: GraftedAttention
    norm1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module
    ls1: nn.Module
    ls2: nn.Module
    stage: TokenStage | None  # removes tokens between attention and MLP; None: no stage
    number: int  # of the block, counted from 0
    prefix: int  # P
    ranking_rows: int  # see `hosts.ranking_rows`

    def before(self, x: Tensor) -> Tensor:
        """The attention's input, from the residual stream x [B, N, C]."""
        return self.norm1(x)

    def added(self, out: Tensor) -> Tensor:
        """What the attention's output adds to the residual stream."""
        return self.drop_path1(self.ls1(out))

    def after(self, x: Tensor) -> Tensor:
        """x [B, N, C] plus what the MLP adds."""
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def forward(self, x: Tensor, tokens: TokenState) -> tuple[Tensor, TokenState]:
        """x [B, N, C] -> [B, N or fewer, C], and the state of these tokens."""
        P, stage = self.prefix, self.stage
        bias = self.bias(tokens)
        if stage is not None and stage.count(x.shape[1] - P, tokens.patches) == 0:  # only prefix rows are needed
            out = self.added(self.attn.prefix_rows(self.before(x), P, tokens, tokens.rope_of(self.number), bias))
            x, tokens = stage.drop_all(x, tokens)
            return self.after(x + out), tokens
        x, q, k, _ = self.attended(x, tokens, bias)
        if stage is not None:
            x, tokens = stage(x, self.importance(x, q, k, tokens, bias), tokens)
        return self.after(x), tokens

    def bias(self, tokens: TokenState) -> Tensor | None:
        """Position bias of the logits for the tokens present, [B or 1, H, N, N]."""
        return tokens.bias_of(projection.position_bias(self.attn, tokens.bias), self.prefix)

    def attended(self, x: Tensor, tokens: TokenState, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The residual stream after the attention, [B, N, C], and its q, k and v, [B, H, N, d] each."""
        h = self.before(x)
        q, k, v = self.attn.qkv_heads(h, tokens.rope_of(self.number))
        return x + self.added(self.attn.close(self.attn.attend(q, k, v, bias, tokens), h)), q, k, v

    def importance(self, x: Tensor, q: Tensor, k: Tensor, tokens: TokenState, bias: Tensor | None) -> Tensor:
        """I of the patch tokens, [B, n]: x [B, N, C] after the attention, its q and k [B, H, N, d]."""
        P, weights = self.prefix, self.attn.importance
        if weights is not None:
            return fitted_importance(x, weights, tokens.size, P)
        return attention_importance(q, k, self.attn.scale, tokens.size, self.ranking_rows, P, bias)


class TokenBlock(AnyTokenBlock, Block):  # type: ignore[misc]
    """timm's `Block`."""


class _PostNorm(AnyTokenBlock):
    """Norms after attention and MLP."""

    def before(self, x: Tensor) -> Tensor:
        return x

    def added(self, out: Tensor) -> Tensor:
        return self.drop_path1(self.norm1(out))

    def after(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class TokenResPostBlock(_PostNorm, ResPostBlock):  # type: ignore[misc]
    """timm's `ResPostBlock`."""


class TokenEvaBlockPostNorm(_PostNorm, EvaBlockPostNorm):  # type: ignore[misc]
    """timm's `EvaBlockPostNorm`."""


class _ScaledByGamma(AnyTokenBlock):
    """LayerScale as bare parameters."""

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def added(self, out: Tensor) -> Tensor:
        return self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out)

    def after(self, x: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x))
        return x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class TokenEvaBlock(_ScaledByGamma, EvaBlock):  # type: ignore[misc]
    """timm's `EvaBlock`."""


class TokenBeitBlock(_ScaledByGamma, BeitBlock):  # type: ignore[misc]
    """timm's `Block` of Beit."""


HOSTS: dict[type, type] = {
    Block: TokenBlock,
    ResPostBlock: TokenResPostBlock,
    EvaBlock: TokenEvaBlock,
    EvaBlockPostNorm: TokenEvaBlockPostNorm,
    BeitBlock: TokenBeitBlock,
}
"""timm's class -> the class with token stages over the same parameters."""
