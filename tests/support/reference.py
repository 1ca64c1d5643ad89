"""Every scheme of docs/algorithm.md once more: all ranks in one process, plain loops, no flat vector.

Written from that page alone. Vectors are keyed by parameter name; a position in a segment is a pair
(name, offset). Nothing here knows `lgc`: the tests compare it with what real ranks do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Vectors = dict[str, Tensor]  # parameter name -> its values, one-dimensional


@dataclass(frozen=True, kw_only=True)
class Config:
    """The arguments of a scheme, by the names of docs/algorithm.md."""

    scheme: str  # topk, dgc, scalecom, lgc-ring, lgc-ps
    rate: float
    pooled_rate: float | None = None
    momentum: float = 0.0
    clip_norm: float | None = None
    low_pass: float = 1.0
    second_moment: float = 0.0
    reduction: Literal["gather", "two_stage"] = "gather"
    mean_values: str | None = None  # those of `values` if None
    dense_steps: int = 0
    warmup_steps: int = 0
    train_steps: int = 0
    feedback: str = "reconstruction"
    innovation: float = 0.01
    autoencoder_lr: float = 1e-3
    autoencoder_optimizer: str = "adam"
    autoencoder_updates: int = 1
    unit: int | str = 1
    values: str = "float32"
    latent: str = "float32"
    first: str | None = None
    last: str | None = None
    small: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)

    @property
    def learned(self) -> bool:
        return self.scheme in ("lgc-ring", "lgc-ps")


class Segment(NamedTuple):
    """What one top-k selects from: some parameters, in order."""

    names: tuple[str, ...]
    numel: int
    pooled: bool
    unit: int = 1


class Layout(NamedTuple):
    """Dense parameters, and the segments of the two other roles; `order` is that of the flat vector."""

    dense: tuple[str, ...]
    own: tuple[Segment, ...]
    shared: tuple[Segment, ...]

    @property
    def order(self) -> list[str]:
        return [*self.dense, *(name for segment in (*self.own, *self.shared) for name in segment.names)]


def make_layout(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Section "Layout"."""
    weights = [name for name, shape in shapes.items() if len(shape) >= 2]
    smalls = [name for name, shape in shapes.items() if len(shape) < 2]
    default = {"topk": "own", "dgc": "own", "scalecom": "shared", "lgc-ring": "shared", "lgc-ps": "shared"}[
        config.scheme
    ]
    small_role = config.small or ("own" if config.learned else default)

    role = dict.fromkeys(weights, default) | dict.fromkeys(smalls, small_role)
    if len(weights) > 1:
        first = weights[0]
        others = sum(math.prod(shapes[name]) for name in weights[1:])
        wanted = config.first or ("dense" if config.learned else default)
        if wanted != "dense" or math.prod(shapes[first]) <= config.rate * others / 4:
            role[first] = wanted
    if weights:
        role[weights[-1]] = config.last or ("own" if config.learned else default)
    for pattern, override in config.roles.items():
        role |= {name: override for name in shapes if fnmatch(name, pattern)}

    def region(name_of_role: str) -> tuple[Segment, ...]:
        pool = [name for name in smalls if role[name] == name_of_role == small_role]
        segments = []
        if pool:
            segments.append(Segment(tuple(pool), sum(math.prod(shapes[name]) for name in pool), True))
        for name in shapes:
            if role[name] == name_of_role and name not in pool:
                size = math.prod(shapes[name])
                unit = math.prod(shapes[name][2:]) if config.unit == "kernel" else int(config.unit)
                segments.append(Segment((name,), size, False, unit if unit and size % unit == 0 else 1))
        return tuple(segments)

    dense = tuple(name for name in shapes if role[name] == "dense")  # nothing is selected, so there are no segments
    return Layout(dense, region("own"), region("shared"))


def phase_at(config: Config, step: int) -> str:
    """Section "Rate and phases"."""
    for phase, length in (
        ("dense", config.dense_steps),
        ("warmup", config.warmup_steps),
        ("train", config.train_steps),
    ):
        if step < length:
            return phase
        step -= length
    return "compressed"


def count_at(config: Config, segment: Segment, step: int) -> int:
    """How many values of a segment are sent in a step."""
    if segment.numel == 0:
        return 0
    rate = config.rate
    if segment.pooled:
        rate = min(1.0, 4 * config.rate) if config.pooled_rate is None else config.pooled_rate
    if phase_at(config, step) == "warmup":
        falling: list[float] = []
        while 0.25 * 4 ** -len(falling) > config.rate:
            falling.append(0.25 * 4 ** -len(falling))
        if falling:
            j = step - config.dense_steps
            rate = max(rate, falling[j * len(falling) // config.warmup_steps])
    return segment.unit * max(1, round(rate * (segment.numel // segment.unit)))


Positions = list[tuple[str, int]]


def by_parameter(positions: Positions) -> Iterator[tuple[str, list[int], list[int]]]:
    """Every parameter with positions, in their order: its name, where they are in the list, and its offsets."""
    for name, run in groupby(enumerate(positions), key=lambda entry: entry[1][0]):
        places, of_name = zip(*run, strict=True)
        yield name, list(places), [offset for _, offset in of_name]


class Piece(NamedTuple):
    """The part of a segment that lies in one shard."""

    segment: Segment  # with the number of elements of the part
    positions: Positions


def make_pieces(config: Config, shapes: Mapping[str, tuple[int, ...]], world_size: int) -> list[list[Piece]]:
    """Section "Two stages": the pieces of every own segment, one if nothing is cut."""
    layout = make_layout(config, shapes)
    size = sum(segment.numel for segment in layout.own)
    servers = world_size if config.reduction == "two_stage" else 1
    pieces, start = [], 0
    for segment in layout.own:
        positions = [(name, offset) for name in segment.names for offset in range(math.prod(shapes[name]))]
        edges = [min(max(size * server // servers - start, 0), segment.numel) for server in range(servers + 1)]
        edges = [edge - edge % segment.unit for edge in edges]
        parts = [positions[begin:end] for begin, end in pairwise(edges)]
        pieces.append([Piece(segment._replace(numel=len(part)), part) for part in parts if part])
        start += segment.numel
    return pieces


def largest(vectors: Vectors, segment: Segment, count: int, within: Positions | None = None) -> Positions:
    """The positions of `count` elements of a segment, in the units of largest norm, in the order of the segment."""
    everywhere = within or [(name, offset) for name in segment.names for offset in range(vectors[name].numel())]
    values = torch.cat([vectors[name] for name in segment.names]) if within is None else take(vectors, within)
    units = values.double().view(-1, segment.unit)
    norms = units.square().sum(dim=1).tolist()
    chosen = sorted(sorted(range(len(norms)), key=lambda unit: -norms[unit])[: count // segment.unit])
    return [everywhere[unit * segment.unit + place] for unit in chosen for place in range(segment.unit)]


def coded(codec: str, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """What is decoded of values that share a scale: section "Codecs"."""
    if codec == "float32" or not len(x):
        return x.clone()
    if codec == "bfloat16":
        return x.to(torch.bfloat16).to(x.dtype)
    if codec in ("sign", "lloyd2"):
        y = torch.zeros_like(x)
        others = x[x != 0]
        if codec == "sign" and len(others):
            magnitude = others.abs().double().mean().to(x.dtype)
            y[x != 0] = torch.where(others < 0, -magnitude, magnitude)
        elif len(others):
            y[x != 0] = torch.cat([coded_by_two_levels(block) for block in others.split(256)])
        return y
    levels = 2 ** (int(codec.removeprefix("uniform")) - 1) - 1
    largest_magnitude = x.abs().max() if scale is None else scale
    if largest_magnitude == 0:
        return torch.zeros_like(x)
    steps = torch.round(levels * x.double() / largest_magnitude.double()).clamp(-levels, levels)
    decoded: Tensor = (steps * largest_magnitude.double() / levels).to(x.dtype)
    return decoded


def coded_by_two_levels(x: Tensor) -> Tensor:
    """What `lloyd 2` decodes of one block."""
    low, high = 3709 / 8192, 12373 / 8192
    magnitudes = x.abs().double()

    def nearest(scale: Tensor) -> Tensor:
        return torch.where(magnitudes < scale * (low + high) / 2, low, high).double()

    z = nearest(magnitudes.square().mean().sqrt())
    scale = ((magnitudes * z).sum() / z.square().sum()).to(torch.bfloat16).double()
    y = scale * nearest(scale)
    return torch.where(x < 0, -y, y).to(x.dtype)


def take(vectors: Vectors, positions: Positions) -> Tensor:
    return torch.cat([vectors[name][offsets] for name, _, offsets in by_parameter(positions)])


class Weights(NamedTuple):
    """An encoder and one decoder per rank (the ring has one): (weight, bias) of each layer."""

    encoder: list[tuple[Tensor, Tensor]]
    decoders: list[list[tuple[Tensor, Tensor]]]
    latent_scale: Tensor

    @classmethod
    def of(cls, state: Mapping[str, Tensor], decoders: int) -> Weights:
        """From a state dict in the order encoder, decoders, each of five layers with weight and bias."""
        tensors = [tensor.detach().clone() for name, tensor in state.items() if name != "latent_scale"]
        latent_scale = state.get("latent_scale", torch.zeros(4, 1)).clone()
        assert len(tensors) == 10 * (1 + decoders)
        pairs = list(zip(tensors[0::2], tensors[1::2], strict=True))
        return cls(pairs[:5], [pairs[5 * (d + 1) : 5 * (d + 2)] for d in range(decoders)], latent_scale)

    def tensors(self) -> list[Tensor]:
        return [tensor for layers in (self.encoder, *self.decoders) for pair in layers for tensor in pair]


def encode(weights: Weights, x: Tensor) -> Tensor:
    """z = E(x), (mu,) -> (4, ceil(mu / 16))."""
    y = torch.cat([x, x.new_zeros(-len(x) % 16)])[None, :]
    for i in range(4):
        weight, bias = weights.encoder[i]
        y = F.leaky_relu(F.conv1d(y, weight, bias, stride=2, padding=1), 0.01)
    weight, bias = weights.encoder[4]
    return F.conv1d(y, weight, bias)


def decode(weights: Weights, rank: int, z: Tensor, mu: int, innovation: Tensor | None = None) -> Tensor:
    """y = D_rank(z) or D_rank(z, innovation), (4, ceil(mu / 16)) -> (mu,)."""
    y = z
    for i in range(4):
        weight, bias = weights.decoders[rank][i]
        y = F.leaky_relu(F.conv_transpose1d(y, weight, bias, stride=2, padding=1, output_padding=1), 0.01)
    if innovation is not None:
        padded = torch.cat([innovation, innovation.new_zeros(-mu % 16)])
        y = torch.cat([y, padded[None, :]])
    weight, bias = weights.decoders[rank][4]
    return F.conv1d(y, weight, bias)[0, :mu]


class Outcome(NamedTuple):
    """One round: what the optimizers get, and what each rank sent as the others decode it."""

    mean: Vectors
    sent: list[Vectors]
    phase: str
    loss: float | None  # of the autoencoder, in phase train


class Reference:
    """All ranks of one training run, in one process."""

    def __init__(
        self,
        config: Config,
        shapes: Mapping[str, tuple[int, ...]],
        world_size: int,
        *,
        frozen: Weights | None = None,
        initial: Weights | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """With `initial` weights it trains the autoencoder itself, `frozen` ones it uses as they are."""
        self.config = config
        self.layout = make_layout(config, shapes)
        self.shapes = dict(shapes)
        self.K = world_size
        self.dtype = dtype
        self.weights = initial or frozen
        self.optimizer: torch.optim.Optimizer | None = None
        if initial is not None:
            trained = [tensor.requires_grad_() for tensor in initial.tensors()]
            kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.autoencoder_optimizer]
            self.optimizer = kind(trained, lr=config.autoencoder_lr)
        self.u = [self.zeros() for _ in range(world_size)]
        self.s = [self.zeros() for _ in range(world_size)]
        self.v = [self.zeros() for _ in range(world_size)]
        self.server_residual = self.zeros()
        self.t = 0

    def zeros(self) -> Vectors:
        return {name: torch.zeros(math.prod(shape), dtype=self.dtype) for name, shape in self.shapes.items()}

    def accumulate(self, gradients: Sequence[Mapping[str, Tensor]]) -> None:
        """Section "Feedback", the part before anything is sent."""
        for k in range(self.K):
            g = {name: gradients[k][name].reshape(-1).to(self.dtype) for name in self.shapes}
            if self.config.clip_norm is not None:
                norm = math.sqrt(sum((g[name].double() ** 2).sum().item() for name in g))
                if norm > 0:
                    factor = min(1.0, self.config.clip_norm / (math.sqrt(self.K) * norm))
                    g = {name: g[name] * factor for name in g}
            for name in g:
                self.v[k][name] = self.v[k][name] + self.update(k, name, g[name])

    def update(self, k: int, name: str, g: Tensor) -> Tensor:
        """SGD's momentum, or Adam's step."""
        first, second = self.config.momentum, self.config.second_moment
        if second == 0:
            self.u[k][name] = first * self.u[k][name] + g
            return self.u[k][name]
        self.u[k][name] = first * self.u[k][name] + (1 - first) * g
        self.s[k][name] = second * self.s[k][name] + (1 - second) * g**2
        mean = self.u[k][name] / (1 - first ** (self.t + 1))
        square = self.s[k][name] / (1 - second ** (self.t + 1))
        return mean / (square.sqrt() + 1e-8)

    def step(self, gradients: Sequence[Mapping[str, Tensor]]) -> Outcome:
        """One round of every rank."""
        phase = phase_at(self.config, self.t)
        before = [dict(v_k) for v_k in self.v]
        self.accumulate(gradients)
        momenta = [{name: u.clone() for name, u in u_k.items()} for u_k in self.u]
        mean = self.zeros()
        sent = [self.zeros() for _ in range(self.K)]
        loss = None
        if phase == "dense":
            self.exchange_dense(self.layout.order, mean, sent)
        else:
            self.exchange_dense(self.layout.dense, mean, sent)
            self.exchange_own(mean, sent)
            loss = self.exchange_shared(phase, mean, sent)
        if self.config.low_pass < 1:
            self.filter(before)
        if self.config.low_pass < 1 or self.config.second_moment:
            self.u = momenta
        self.t += 1
        return Outcome(mean, sent, phase, loss)

    def filter(self, before: list[Vectors]) -> None:
        """Section "Feedback", the low-pass filter."""
        for k in range(self.K):
            for name in self.shapes:
                change = self.v[k][name] - before[k][name]
                self.v[k][name] = before[k][name] + self.config.low_pass * change

    def exchange_dense(self, names: Sequence[str], mean: Vectors, sent: list[Vectors]) -> None:
        for name in names:
            for k in range(self.K):
                mean[name] += self.v[k][name] / self.K
                sent[k][name] = self.v[k][name].clone()
                self.v[k][name] = torch.zeros_like(self.v[k][name])

    def exchange_own(self, mean: Vectors, sent: list[Vectors]) -> None:
        received = mean if self.config.reduction == "gather" else self.server_residual
        for segment, pieces in zip(self.layout.own, make_pieces(self.config, self.shapes, self.K), strict=True):
            count = count_at(self.config, segment, self.t)
            if count == 0:
                continue
            for k in range(self.K):
                chosen = set(largest(self.v[k], segment, count))
                for piece in pieces:
                    positions = [position for position in piece.positions if position in chosen]
                    if not positions:
                        continue
                    values = coded(self.config.values, take(self.v[k], positions))
                    for name, places, offsets in by_parameter(positions):
                        received[name][offsets] += values[places] / self.K
                        sent[k][name][offsets] = values[places]
                        self.v[k][name][offsets] -= values[places]
                        self.u[k][name][offsets] = 0
            if self.config.reduction == "gather":
                continue
            for piece in pieces:
                count = count_at(self.config, piece.segment, self.t)
                positions = largest(self.server_residual, piece.segment, count, piece.positions)
                values = coded(self.config.mean_values or self.config.values, take(self.server_residual, positions))
                for name, places, offsets in by_parameter(positions):
                    mean[name][offsets] = values[places]
                    self.server_residual[name][offsets] -= values[places]

    def exchange_shared(self, phase: str, mean: Vectors, sent: list[Vectors]) -> float | None:
        leader = self.t % self.K
        groups = [count_at(self.config, segment, self.t) for segment in self.layout.shared]
        positions: Positions = []
        for segment, count in zip(self.layout.shared, groups, strict=True):
            positions += largest(self.v[leader], segment, count) if count else []
        if not positions:
            return None
        mu = len(positions)
        x = [take(self.v[k], positions) for k in range(self.K)]
        scale = math.sqrt((x[leader].double() ** 2).mean().item())

        loss = None
        if phase == "compressed" and self.config.scheme == "lgc-ring":
            average, decoded = self.ring(x, scale)
        elif phase == "compressed" and self.config.scheme == "lgc-ps":
            average, decoded = self.parameter_server(x, scale, leader)
        else:
            decoded = x
            if phase != "train":
                decoded = [torch.cat([coded(self.config.values, part) for part in x_k.split(groups)]) for x_k in x]
            average = sum(decoded, torch.zeros(mu, dtype=self.dtype)) / self.K
            if phase == "train" and self.optimizer is not None:
                losses = [self.train(x, scale, leader) for _ in range(self.config.autoencoder_updates)]
                loss = losses[0]

        where = self.sent_places(phase, x[leader])
        y, x_all, y_all = average[where], torch.stack(x)[:, where], torch.stack(decoded)[:, where]
        for name, places, offsets in by_parameter(list(map(positions.__getitem__, where))):
            mean[name][offsets] = y[places]
            for k in range(self.K):
                sent[k][name][offsets] = y_all[k][places]
                if self.config.feedback == "paper":
                    self.v[k][name][offsets] = 0
                else:
                    self.v[k][name][offsets] = x_all[k][places] - y_all[k][places]
                self.u[k][name][offsets] = 0
        return loss

    def sent_places(self, phase: str, x_leader: Tensor) -> list[int]:
        """Which of the selected positions are sent: by an autoencoder, those where the leader has no zero."""
        learned = phase == "compressed" and self.config.learned
        places: list[int] = x_leader.nonzero().flatten().tolist()
        return places if learned else list(range(len(x_leader)))

    def ring(self, x: list[Tensor], scale: float) -> tuple[Tensor, list[Tensor]]:
        assert self.weights is not None
        mu = len(x[0])
        with torch.no_grad():
            z = [self.quantised(encode(self.weights, x_k / (scale or 1))) for x_k in x]
            average = scale * decode(self.weights, 0, sum(z, torch.zeros_like(z[0])) / self.K, mu)
            return average, [scale * decode(self.weights, 0, z_k, mu) for z_k in z]

    def quantised(self, z: Tensor) -> Tensor:
        """A latent of the ring as it is summed, (4, n)."""
        assert self.weights is not None
        if self.config.latent == "float32":
            return z
        scales = self.weights.latent_scale
        return torch.stack([coded(self.config.latent, z[c], scales[c, 0]) for c in range(4)])

    def innovation(self, x: Tensor) -> Tensor:
        """The largest values of x, zero elsewhere."""
        count = max(1, round(self.config.innovation * len(x)))
        magnitudes = x.abs().tolist()
        e = torch.zeros_like(x)
        places = sorted(sorted(range(len(x)), key=lambda place: -magnitudes[place])[:count])
        e[places] = coded(self.config.values, x[places])
        return e

    def relayed(self, z: Tensor) -> Tensor:
        """A latent of the parameter server as it is decoded, (4, n)."""
        return torch.stack([coded(self.config.latent, channel) for channel in z])

    def parameter_server(self, x: list[Tensor], scale: float, leader: int) -> tuple[Tensor, list[Tensor]]:
        assert self.weights is not None
        mu = len(x[0])
        with torch.no_grad():
            z = self.relayed(encode(self.weights, x[leader] / (scale or 1)))
            y = [decode(self.weights, k, z, mu, self.innovation(x[k] / (scale or 1))) for k in range(self.K)]
            return scale * sum(y, torch.zeros(mu, dtype=self.dtype)) / self.K, [scale * y_k for y_k in y]

    def train(self, x: list[Tensor], scale: float, leader: int) -> float:
        """One step of the optimizer on the loss of section "Autoencoder"; returns the loss before it."""
        assert self.weights is not None
        assert self.optimizer is not None
        mu = len(x[0])
        n = [x_k / (scale or 1) for x_k in x]
        z = [encode(self.weights, n_k) for n_k in n]
        if self.config.scheme == "lgc-ring":
            target = sum(n, torch.zeros_like(n[0])) / self.K
            loss = F.mse_loss(decode(self.weights, 0, sum(z, torch.zeros_like(z[0])) / self.K, mu), target)
        else:
            loss = torch.zeros((), dtype=self.dtype)
            for k in range(self.K):
                y = decode(self.weights, k, z[leader], mu, self.innovation(n[k]))
                loss = loss + 0.5 * F.mse_loss(y, n[k])
                for other in range(self.K):
                    if other != k:
                        loss = loss + 0.5 * F.mse_loss(z[k], z[other])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
