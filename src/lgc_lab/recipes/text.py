"""GPT of the bytes of Python's standard library, which every machine has."""

import math
import sysconfig
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgc_lab.recipes.data import Data, Split
from lgc_lab.recipes.recipe import Metric, Recipe, warmup_and_cosine

BYTES = 256
CONTEXT = 128
TEST_EVERY = 20  # one file in this many is for testing
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib"}  # absent from some installations


class TextSplit(Split):
    """Windows of `CONTEXT` bytes of a text, at most `limit`, and the bytes that follow each; uint8.

    With a generator they start anywhere.
    """

    def __init__(self, text: Tensor, limit: int | None) -> None:
        windows = max(0, len(text) - 1) // CONTEXT
        self.windows = windows if limit is None else min(limit, windows)
        self.text = text[: self.windows * CONTEXT + 1]

    def __len__(self) -> int:
        return self.windows

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        starts = CONTEXT * indices
        if generator is not None:
            starts = starts + torch.randint(CONTEXT, starts.shape, generator=generator)
            starts = starts.clamp(max=len(self.text) - CONTEXT - 1)
        windows = self.text[starts[:, None] + torch.arange(CONTEXT + 1)].long()
        return windows[:, :-1], windows[:, 1:]


def load_text(path: str | None, limit_train: int | None) -> Data:
    """Load Python sources below a folder, by default the standard library; every 20th file is for testing."""
    folder = Path(path or sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder.")
    found = (file for file in folder.rglob("*.py") if NOT_LIBRARY.isdisjoint(file.relative_to(folder).parts))
    files = sorted(file for file in found if file.is_file())
    if len(files) < 2:
        raise FileNotFoundError(f"{folder} must have at least two *.py files to train and test on, got {len(files)}.")
    splits = []
    for part, limit in (("train", limit_train), ("test", None)):
        chosen = (file for number, file in enumerate(files) if (number % TEST_EVERY == 0) == (part == "test"))
        content = bytearray(b"".join(file.read_bytes() for file in chosen))
        splits.append(TextSplit(torch.from_numpy(np.frombuffer(content, dtype=np.uint8)), limit))
        if len(splits[-1]) == 0:
            raise ValueError(f"{folder} must have more than {CONTEXT} bytes to {part} on.")
    return Data(*splits)


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
        """Attend: (batch, length, width) -> the same, each position from those up to it."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


class GPT(nn.Module):
    """Decoder-only transformer. Source: Radford et al., GPT-2, 2019.

    (batch, length) of tokens -> (batch, length, vocabulary) of logits for the next ones. `context` is the greatest
    length, `width` that of the residual stream, `depth` the number of blocks; `heads` divides `width`.
    """

    def __init__(self, *, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight  # Press and Wolf, EACL 2017, arXiv 1608.05859
        # deviation 0.02, smaller by 1/sqrt(2 depth) for what is added to the residual stream, as in GPT-2
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


def next_byte_loss(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction=reduction)


def _sum_bits(outputs: Tensor, targets: Tensor) -> Tensor:
    bits = next_byte_loss(outputs, targets, "sum").double() / math.log(2)
    return torch.stack([bits, torch.full_like(bits, targets.numel())])


TEXT_GPT = Recipe(
    name="text-gpt",
    summary="Python's standard library by the byte, a GPT of 1.9 million parameters",
    model=partial(GPT, vocabulary=BYTES, context=CONTEXT, width=192, depth=4, heads=4),
    data=load_text,
    loss=next_byte_loss,
    metric=Metric(name="bits_per_byte", sums=_sum_bits, value=lambda sums: float(sums[0] / sums[1]), better="lower"),
    batch_size=16,
    evaluation_batch=64,
    epochs=4,
    optimizer="adamw",
    learning_rate=4e-3,
    weight_decay=0.1,
    learning_rate_factor=warmup_and_cosine,
    scheme_defaults={
        "rate": 0.001,
        "momentum": 0.0,
        "start_steps": 300,
        "dense_steps": 200,
        "warmup_steps": 400,
        "train_steps": 300,
    },
)
"""Betas 0.9 and 0.95, weight decay 0.1, warm-up and cosine as for GPT-3 (Brown et al., arXiv 2005.14165, appendix B);
about 64 windows a step as nanoGPT's character-level models, at four times their learning rate, with which it ends
lower. The scheme has no momentum correction: error feedback only, with Adam's own moments after the exchange."""
