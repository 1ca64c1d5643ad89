"""Decoder-only transformer. Source: Radford et al., GPT-2, 2019."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Causal self-attention and a feed-forward part, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.project(self.attend(self.norm1(x)))
        h: Tensor = self.contract(F.gelu(self.expand(self.norm2(x))))
        return x + h

    def attend(self, x: Tensor) -> Tensor:
        """(batch, length, width) -> the same, each position from those up to it."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


class GPT(nn.Module):
    """(batch, length) of tokens -> (batch, length, vocabulary) of logits for the next ones.

    Args:
        vocabulary: number of tokens.
        context: greatest length.
        width: of the residual stream.
        depth: number of blocks.
        heads: of each attention; divides `width`.
    """

    def __init__(self, *, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight  # Press and Wolf, EACL 2017, arXiv 1608.05859
        self.initialise(depth)

    def initialise(self, depth: int) -> None:
        """Deviation 0.02, smaller by 1/sqrt(2 depth) for what is added to the residual stream. Source: GPT-2."""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                added = name.endswith(("project.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if added else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits
