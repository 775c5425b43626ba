"""A pooling that timm's models do not have, put where they have their own (`attn_pool`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenAndMean(nn.Module):
    """The cls token beside the mean of the patches, as DINOv2's linear classifiers read them."""

    def __init__(self, prefix: int) -> None:
        """prefix: number of cls and register tokens."""
        super().__init__()
        self.prefix = prefix

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, 2*C]."""
        return torch.cat([x[:, 0], x[:, self.prefix :].mean(1)], 1)
