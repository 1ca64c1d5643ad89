"""The autoencoder of the paper: 1-D convolutions over the selected values, so that any length works.

Source: LGC, section IV. E is shared by all ranks; the ring variant has one decoder, the parameter server one a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgc.coding import Float32, Uniform, ValueCodec

STRIDE = 16  # four convolutions of stride 2
LATENT_CHANNELS = 4
SLOPE = 0.01

LATENT_RANGE = 2.5  # root mean squares; near the best for 16 levels and a Gaussian: Max, IRE Trans. IT-6, 1960
LATENT_SCALE_DECAY = 0.9

LEVELS = 127  # of exact convolutions; sums of up to 2^24 / 127^2 = 1040 products of such integers are exact in float32

RingLatent = Float32 | Uniform
Convolution = Callable[..., Tensor]  # as F.conv1d
Optimizer = Literal["adam", "sgd"]
Module = TypeVar("Module", bound=nn.Module)


def latent_shape(length: int) -> tuple[int, int]:
    """Shape of the latent of `length` values."""
    return LATENT_CHANNELS, -(-length // STRIDE)


class Encoder(nn.Module):
    """z = E(x), shape (batch, mu) -> (batch, 4, ceil(mu / 16)). 172,996 parameters."""

    def __init__(self) -> None:
        super().__init__()
        channels = (1, 64, 128, 256, 64)
        self.downs = nn.ModuleList(
            _skip_init(nn.Conv1d, inputs, outputs, 3, stride=2, padding=1) for inputs, outputs in pairwise(channels)
        )
        self.out = _skip_init(nn.Conv1d, channels[-1], LATENT_CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.pad(x, (0, -x.shape[-1] % STRIDE)).unsqueeze(1)
        for down in self.downs:
            h = F.leaky_relu(down(h), SLOPE, inplace=True)
        z: Tensor = self.out(h)
        return z


class Doubling(nn.ConvTranspose1d):
    """The decoder's transposed convolution, as one convolution that makes the even and the odd outputs.

    The result is that of the base class but for rounding. torch has no fast kernel for the base class on CPUs: decoding
    31,000 values takes 2.5 times as long with it.
    """

    def __init__(self, inputs: int, outputs: int, *, device: str, dtype: torch.dtype) -> None:
        super().__init__(inputs, outputs, 3, stride=2, padding=1, output_padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor, output_size: list[int] | None = None, *, convolve: Convolution = F.conv1d) -> Tensor:
        first, middle, last = self.weight.unbind(2)
        even = torch.stack([middle, torch.zeros_like(middle)], dim=2)  # y[2i] = middle x[i]
        odd = torch.stack([last, first], dim=2)  # y[2i + 1] = last x[i] + first x[i + 1]
        weight = torch.stack([even, odd], dim=2).permute(1, 2, 0, 3).flatten(0, 1)
        assert self.bias is not None
        both = convolve(x, weight, self.bias.repeat_interleave(2), padding=1)[..., 1:]
        y: Tensor = both.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2)
        return y


class Decoder(nn.Module):
    """y = D(z) or, with an innovation, y = D(z, e); the first `length` values, shape (batch, length).

    The innovation e has shape (batch, length) and is one more channel of the last convolution, which is 1 wide.
    43,681 parameters, with an innovation 43,682.

    With `exact` the result is the same bits on any hardware and with any number of threads, and a little coarser.
    """

    out: nn.Conv1d

    def __init__(self, *, innovation: bool = False) -> None:
        super().__init__()
        channels = (LATENT_CHANNELS, 32, 64, 128, 32)
        self.ups = nn.ModuleList(_skip_init(Doubling, inputs, outputs) for inputs, outputs in pairwise(channels))
        self.hidden_channels = channels[-1]
        self.out = _skip_init(nn.Conv1d, self.hidden_channels + innovation, 1, 1)

    def forward(self, z: Tensor, length: int, innovation: Tensor | None = None, *, exact: bool = False) -> Tensor:
        convolve: Convolution = _exact_conv1d if exact else F.conv1d
        h = z
        for up in self.ups:
            h = F.leaky_relu(up(h, convolve=convolve), SLOPE, inplace=True)
        of_hidden, of_innovation = self.out.weight.tensor_split([self.hidden_channels], dim=1)
        y: Tensor = convolve(h, of_hidden, self.out.bias)[:, 0, :length]
        return y if innovation is None else y + of_innovation.flatten() * innovation


class RingAutoencoder(nn.Module):
    """One encoder, one decoder of the averaged latent.

    A quantised latent is trained through. Its sum over the ranks is one of integers, for which all ranks need one scale
    of each channel: a running mean, kept with the weights.

    Args:
        generator: of the initial weights.
        latent: how the latent is sent.
    """

    latent_scale: Tensor

    def __init__(self, generator: torch.Generator, latent: RingLatent) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.register_buffer("latent_scale", torch.zeros(LATENT_CHANNELS, 1, dtype=torch.float32))
        _initialise(self, generator)

    def loss(self, x: Tensor) -> Tensor:
        """MSE(D(mean_k E(x_k)), mean_k x_k) for the scaled vectors of all ranks, shape (K, mu)."""
        z = self.encoder(x)
        if isinstance(self.latent, Uniform):
            self._observe(z.detach())
            z = self.latent.fake_quantise(z, self.latent_scale)
        y: Tensor = self.decoder(z.mean(dim=0, keepdim=True), x.shape[1])
        return F.mse_loss(y, x.mean(dim=0, keepdim=True))

    def _observe(self, z: Tensor) -> None:
        scale = LATENT_RANGE * z.square().mean(dim=(0, 2)).sqrt().unsqueeze(1)
        decay = LATENT_SCALE_DECAY * (self.latent_scale > 0).float()  # torch.where would take the default dtype
        scale = decay * self.latent_scale + (1 - decay) * scale
        self.latent_scale.copy_(torch.where(torch.isfinite(scale), scale, self.latent_scale))


class ServerAutoencoder(nn.Module):
    """One encoder of the common part, one decoder a rank. The latent is trained through its codec.

    Args:
        world_size: number of decoders.
        generator: of the initial weights.
        latent: how the latent is sent, a group of values for each channel.
        innovation: fraction of its values that every rank sends itself.
    """

    def __init__(self, world_size: int, generator: torch.Generator, latent: ValueCodec, innovation: float) -> None:
        super().__init__()
        self.latent = latent
        self.innovation = innovation
        self.encoder = Encoder()
        self.decoders = nn.ModuleList(Decoder(innovation=True) for _ in range(world_size))
        _initialise(self, generator)

    def decode(self, z: Tensor, innovations: Tensor, *, exact: bool = False) -> Tensor:
        """y_k = D_k(z, e_k) for all k; z of shape (1, 4, ceil(mu / 16)), innovations and result (K, mu)."""
        pairs = zip(self.decoders, innovations, strict=True)
        return torch.cat([decoder(z, innovations.shape[1], e[None], exact=exact) for decoder, e in pairs])

    def loss(self, x: Tensor, innovations: Tensor, leader: int) -> Tensor:
        """Reconstruction and similarity, for the scaled vectors of all ranks, shape (K, mu).

        0.5 * sum_k MSE(y_k, x_k) + 0.5 * sum_{k != l} MSE(E(x_k), E(x_l))
        """
        z = self.encoder(x)
        y = self.decode(self._sent(z[leader : leader + 1]), innovations)
        reconstruction: Tensor = (y - x).square().mean(dim=1).sum()
        similarity: Tensor = (z[:, None] - z[None, :]).square().mean(dim=(2, 3)).sum()
        return 0.5 * reconstruction + 0.5 * similarity

    def encode_latent(self, z: Tensor) -> Tensor:
        """The bytes of one latent, shape (1, 4, n)."""
        return self.latent.encode(z.flatten(), [z.shape[2]] * LATENT_CHANNELS)

    def decode_latent(self, data: Tensor, length: int) -> Tensor:
        """The latent of `length` values that has these bytes, on the CPU."""
        channels, positions = latent_shape(length)
        return self.latent.decode(data, [positions] * channels).view(1, channels, positions)

    def latent_bound(self, length: int) -> int:
        """Largest possible number of these bytes."""
        channels, positions = latent_shape(length)
        return self.latent.bound([positions] * channels)

    def _sent(self, z: Tensor) -> Tensor:
        # Straight through: the value is what is decoded, the gradient that of the identity. NaN and Inf become NaN.
        finite = z.detach().nan_to_num(0.0, 0.0, 0.0)
        decoded = self.decode_latent(self.encode_latent(finite), STRIDE * z.shape[2]).to(z.device)
        return decoded + (z - z.detach())


Autoencoder = RingAutoencoder | ServerAutoencoder


def make_optimizer(module: nn.Module, kind: Optimizer, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of the autoencoder's own training."""
    if kind == "sgd":
        return torch.optim.SGD(module.parameters(), lr=learning_rate)
    adam = torch.optim.Adam(module.parameters(), lr=learning_rate)
    for parameter in module.parameters():  # now, not in the first step, so that state_dict always has the same form
        moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return adam


def pack_weights(module: nn.Module) -> Tensor:
    """All weights and buffers as one float32 vector."""
    return torch.cat([tensor.detach().flatten() for tensor in module.state_dict().values()])


def unpack_weights(module: nn.Module, vector: Tensor) -> None:
    """Set all weights from `pack_weights` of a module of the same form."""
    tensors = module.state_dict().values()
    for tensor, part in zip(tensors, vector.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@contextmanager
def replicated(device: torch.device) -> Iterator[None]:
    """Inference that gives the same bits again, on the same hardware: only deterministic kernels."""
    cudnn = torch.backends.cudnn  # its flags() would fail where fp32_precision has been set
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def trainable(device: torch.device) -> Iterator[None]:
    """Training inside a gradient hook, where torch has switched gradients off."""
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def _exact_conv1d(x: Tensor, weight: Tensor, bias: Tensor, padding: int = 0) -> Tensor:
    """F.conv1d of x and the weight rounded to 8 bits, each relative to its largest value (x by sample).

    The convolution then adds integers, without rounding whatever the order, and also where a kernel keeps only 8 bits
    of its factors' mantissas (bfloat16, TF32); one by Fourier transforms is rounded back to them. All else is element
    by element, as IEEE 754 has it.
    """
    assert weight[0].numel() <= 2**24 / LEVELS**2
    x, x_step = _round(x, (1, 2))
    weight, weight_step = _round(weight, (0, 1, 2))
    return F.conv1d(x, weight, padding=padding).round_().mul_(x_step * weight_step).add_(bias.unsqueeze(1))


def _round(tensor: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Integers in [-127, 127], as floats, and the step that they count."""
    step = tensor.abs().amax(dim=dims, keepdim=True) * (1 / LEVELS)
    step = torch.where(step == 0, 1.0, step)
    return (tensor / step).round_(), step


def _skip_init(kind: type[Module], *args: int, **kwargs: Any) -> Module:
    # The constructor's own initialisation would draw from the user's global generator.
    return kind(*args, **kwargs, device="meta", dtype=torch.float32).to_empty(device="cpu")


def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    """torch's default initialisation of convolutions, from our own generator; decoders start as y = e, or y = 0.

    So an untrained autoencoder is never worse than sending nothing, or the innovation alone.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            bound = 1 / math.sqrt(layer.weight.shape[1] * layer.kernel_size[0])
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            assert layer.bias is not None
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    for decoder in module.modules():
        if isinstance(decoder, Decoder):
            nn.init.zeros_(decoder.out.weight)
            nn.init.ones_(decoder.out.weight[:, decoder.hidden_channels :])
            assert decoder.out.bias is not None
            nn.init.zeros_(decoder.out.bias)
