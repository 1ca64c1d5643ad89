"""Gradients and models at the edge of what the schemes are defined for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks import Ranks
from reference import Config, Reference, Weights, count_at, decode, encode, make_layout, phase_at
from rounds import SHAPES, Run, Shapes, gradient, joined, run_rounds, scheme_of
from torch import Tensor

import lgc
from lgc.autoencoder import Decoder, Doubling, RingAutoencoder, ServerAutoencoder, latent_shape, replicated
from lgc.replicas import digest
from lgc.selection import LONG, SAMPLES, largest

RankFactory = Callable[[int], Ranks]

LEARNED: dict[str, Any] = {"momentum": 0.9, "dense_steps": 2, "warmup_steps": 3, "train_steps": 3}
CONFIGS: dict[str, Config] = {
    "topk": Config(scheme="topk", rate=0.02, warmup_steps=3),
    "topk-server": Config(scheme="topk", rate=0.02, warmup_steps=3, server=True),
    "dgc": Config(scheme="dgc", rate=0.02, momentum=0.9, clip_norm=1.0, warmup_steps=3),
    "scalecom": Config(scheme="scalecom", rate=0.02, warmup_steps=3),
    "lgc-ring": Config(scheme="lgc-ring", rate=0.02, **LEARNED),
    "lgc-ring-paper": Config(scheme="lgc-ring", rate=0.02, feedback="paper", **LEARNED),
    "lgc-ps": Config(scheme="lgc-ps", rate=0.02, **LEARNED),
    "lgc-ps-paper": Config(scheme="lgc-ps", rate=0.02, feedback="paper", **LEARNED),
}
LOSSLESS = [name for name, config in CONFIGS.items() if config.feedback != "paper"]
STEPS = 14
WORLD_SIZE = 3

every_scheme = pytest.mark.parametrize("scheme", CONFIGS)

MODELS: dict[str, Shapes] = {
    "empty and one-element tensors": {
        "a": (0, 3),
        "b": (0,),
        "c": (1, 1),
        "d": (1,),
        "e": (),
        "f": (4, 0),
        "g": (6, 7),
        "h": (1, 2),
    },
    "one weight": {"only.weight": (7, 9)},
    "one weight and its bias": {"only.weight": (7, 9), "only.bias": (7,)},
    "one element": {"only": (1,)},
    "no weights": {"scale": (31,), "shift": (31,)},
    "only empty tensors": {"nothing": (0,), "nowhere": (0, 5)},
    "a shared part shorter than 16": {"first": (6, 6), "second": (8, 8), "third": (9, 8), "last": (4, 9)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_digest_taken_in_parts_tells_every_changed_word(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    tensor = (torch.arange(23) % 3).to(dtype)
    whole = digest(tensor)
    monkeypatch.setattr("lgc.replicas.DIGEST_WORDS", 4)
    assert torch.equal(digest(tensor), whole)
    for place in range(len(tensor)):
        changed = tensor.clone()
        changed[place] = 1 - tensor[place].int()
        assert not torch.equal(digest(changed), whole)


def zeros(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def assert_equals_reference(config: Config, shapes: Shapes, real: list[Run]) -> None:
    """Mean and residual of every rank and step, for gradients of `gradient`."""
    world_size = len(real)
    frozen = None
    if config.learned:
        assert real[0].frozen is not None
        frozen = Weights.of(real[0].frozen, world_size if config.scheme == "lgc-ps" else 1)
    reference = Reference(config, shapes, world_size, frozen=frozen)
    for t in range(len(real[0].steps)):
        expected = reference.step([gradient(shapes, k, t) for k in range(world_size)])
        for k, run in enumerate(real):
            where = f"step {t} ({expected.phase}), rank {k}"
            for what, actual, wanted in (
                ("mean", run.steps[t].mean, joined(expected.mean)),
                ("residual", run.steps[t].residual, joined(reference.v[k])),
            ):
                tolerance = 1e-5 * max(1e-3, wanted.abs().max().item() if wanted.numel() else 0.0)
                torch.testing.assert_close(
                    actual, wanted, rtol=1e-4, atol=tolerance, msg=f"{what}, {where}: {{}}".format
                )


@every_scheme
@pytest.mark.parametrize("model", MODELS)
def test_models_of_unusual_shapes_equal_the_reference(ranks: RankFactory, model: str, scheme: str) -> None:
    config, shapes = CONFIGS[scheme], MODELS[model]
    assert_equals_reference(
        config, shapes, ranks(WORLD_SIZE).run(run_rounds, scheme_of(config), shapes, list(range(STEPS)))
    )


def test_the_short_shared_part_is_short_and_there() -> None:
    shapes = MODELS["a shared part shorter than 16"]
    for scheme in ("lgc-ring", "lgc-ps"):
        config = CONFIGS[scheme]
        mu = sum(count_at(config, segment, STEPS) for segment in make_layout(config, shapes).shared)
        assert 0 < mu < 16


@every_scheme
def test_at_a_tiny_rate_every_segment_sends_one_value(ranks: RankFactory, scheme: str) -> None:
    config = dataclasses.replace(CONFIGS[scheme], rate=1e-7, warmup_steps=0, small=None)
    shapes = {name: shape for name, shape in SHAPES.items() if name != "body2.weight"}
    real = ranks(2).run(run_rounds, scheme_of(config), shapes, list(range(STEPS)))
    assert_equals_reference(config, shapes, real)
    layout = make_layout(config, shapes)
    assert layout.dense == ()
    for run in real:
        for t in range(STEPS):
            if phase_at(config, t) != "dense":
                assert int((run.steps[t].sent != 0).sum()) == len(layout.own) + len(layout.shared)


@pytest.mark.parametrize("scheme", ["topk", "topk-server", "dgc", "scalecom"])
def test_at_rate_one_a_linear_scheme_is_dense(ranks: RankFactory, scheme: str) -> None:
    config = dataclasses.replace(CONFIGS[scheme], rate=1.0, warmup_steps=0, momentum=0.0, clip_norm=None)
    real = ranks(WORLD_SIZE).run(run_rounds, scheme_of(config), SHAPES, list(range(5)))
    for run in real:
        for t in range(5):
            average = torch.stack([joined(gradient(SHAPES, k, t)) for k in range(WORLD_SIZE)]).mean(0)
            torch.testing.assert_close(run.steps[t].mean, average)
            assert not run.steps[t].residual.any()


@every_scheme
def test_at_rate_one_everything_still_equals_the_reference(ranks: RankFactory, scheme: str) -> None:
    config = dataclasses.replace(CONFIGS[scheme], rate=1.0)
    real = ranks(WORLD_SIZE).run(run_rounds, scheme_of(config), SHAPES, list(range(STEPS)))
    assert_equals_reference(config, SHAPES, real)


@every_scheme
def test_zero_gradients_give_a_zero_mean_and_leave_nothing_behind(ranks: RankFactory, scheme: str) -> None:
    nothing = [zeros(SHAPES)] * WORLD_SIZE
    for run in ranks(WORLD_SIZE).run(run_rounds, scheme_of(CONFIGS[scheme]), SHAPES, [nothing] * STEPS):
        for step in run.steps:
            assert not step.mean.any()
            assert not step.sent.any()
            assert not step.residual.any()


@every_scheme
def test_a_rank_without_gradient_takes_part(ranks: RankFactory, scheme: str) -> None:
    """Rank 0, which leads and serves, has nothing: everything stays finite and the same on all ranks."""
    given = [[zeros(SHAPES), *(gradient(SHAPES, rank, t) for rank in range(1, WORLD_SIZE))] for t in range(STEPS)]
    real = ranks(WORLD_SIZE).run(run_rounds, scheme_of(CONFIGS[scheme]), SHAPES, given)
    for t in range(STEPS):
        assert torch.isfinite(real[0].steps[t].mean).all()
        for run in real:
            assert torch.equal(run.steps[t].mean, real[0].steps[t].mean)
            assert torch.isfinite(run.steps[t].residual).all()


def tied(rank: int) -> dict[str, Tensor]:
    """Every coordinate of a rank has the same magnitude."""
    return {name: torch.full(shape, 0.5 + 0.25 * rank) for name, shape in SHAPES.items()}


@every_scheme
def test_of_ties_exactly_k_are_sent(ranks: RankFactory, scheme: str) -> None:
    config = CONFIGS[scheme]
    layout = make_layout(config, SHAPES)
    given = [[tied(rank) for rank in range(WORLD_SIZE)]] * STEPS
    for run in ranks(WORLD_SIZE).run(run_rounds, scheme_of(config), SHAPES, given):
        for t in range(STEPS):
            segments = (*layout.own, *layout.shared)
            expected = sum(count_at(config, segment, t) for segment in segments)
            if phase_at(config, t) == "dense":
                expected = run.steps[t].sent.numel()
            assert int((run.steps[t].sent != 0).sum()) == expected


@pytest.mark.parametrize("scheme", LOSSLESS)
def test_of_ties_none_is_lost(ranks: RankFactory, scheme: str) -> None:
    config = dataclasses.replace(CONFIGS[scheme], momentum=0.0, clip_norm=None)
    given = [[tied(rank) for rank in range(WORLD_SIZE)]] * STEPS
    for rank, run in enumerate(ranks(WORLD_SIZE).run(run_rounds, scheme_of(config), SHAPES, given)):
        delivered = torch.stack([step.sent for step in run.steps]).sum(0)
        torch.testing.assert_close(delivered + run.steps[-1].residual, STEPS * joined(tied(rank)))


@every_scheme
def test_gradients_of_any_magnitude_stay_finite(ranks: RankFactory, scheme: str) -> None:
    """From far below to far above what float32 can square."""
    for scale in (1e-30, 1e15, 1e20):
        given = [
            [{name: scale * g for name, g in gradient(SHAPES, rank, t).items()} for rank in range(2)]
            for t in range(STEPS)
        ]
        config = dataclasses.replace(CONFIGS[scheme], clip_norm=None)
        for run in ranks(2).run(run_rounds, scheme_of(config), SHAPES, given):
            for t, step in enumerate(run.steps):
                assert torch.isfinite(step.mean).all(), f"step {t}"
                assert torch.isfinite(step.residual).all(), f"step {t}"
                assert math.isfinite(step.reconstruction_error or 0), f"step {t}"


def test_a_small_tensor_whose_last_role_is_that_of_the_others_is_in_the_pool_again() -> None:
    shapes = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]
    plain = lgc.LGCRing(rate=0.05).layout(shapes)
    overridden = lgc.LGCRing(rate=0.05, roles={"*.bias": lgc.Role.SHARED, "*s": lgc.Role.OWN}).layout(shapes)
    assert overridden.own == plain.own


# --- the autoencoder by itself ---


@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_doubling_is_the_transposed_convolution(length: int) -> None:
    torch.manual_seed(0)
    layer, x = Doubling(3, 5, device="cpu", dtype=torch.float32), torch.randn(2, 3, length)
    plain = torch.nn.ConvTranspose1d(3, 5, 3, stride=2, padding=1, output_padding=1)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x))
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_batch_that_overflows_leaves_the_scale_of_the_latent_as_it_was() -> None:
    autoencoder = RingAutoencoder(torch.Generator().manual_seed(0), lgc.Uniform(bits=4))
    x = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    autoencoder.loss(x)
    before = autoencoder.latent_scale.clone()
    assert not torch.isfinite(autoencoder.loss(x * torch.tensor([[1.0], [1e25]])))
    assert torch.equal(autoencoder.latent_scale, before)
    assert torch.isfinite(autoencoder.loss(x))


@pytest.mark.parametrize("length", range(1, 201))
def test_the_ring_autoencoder_returns_every_length(length: int) -> None:
    autoencoder = RingAutoencoder(torch.Generator().manual_seed(0), lgc.Float32())
    x = torch.randn(length, generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        z = autoencoder.encoder(x[None])
        y = autoencoder.decoder(z, length)
    assert z.shape[1:] == latent_shape(length) == (4, -(-length // 16))
    assert y.shape == (1, length)
    reference = Weights.of(autoencoder.state_dict(), 1)
    torch.testing.assert_close(z[0], encode(reference, x))
    torch.testing.assert_close(y[0], decode(reference, 0, z[0], length))


@pytest.mark.parametrize("length", range(1, 201))
def test_the_server_autoencoder_returns_every_length(length: int) -> None:
    world_size = 2
    autoencoder = ServerAutoencoder(world_size, torch.Generator().manual_seed(0), lgc.Float32())
    x = torch.randn(world_size, length, generator=torch.Generator().manual_seed(length))
    innovations = x * (x.abs() >= x.abs().amax(dim=1, keepdim=True))
    with torch.no_grad():
        z = autoencoder.encoder(x[:1])
        y = autoencoder.decode(z, innovations)
    assert z.shape[1:] == latent_shape(length)
    assert y.shape == (world_size, length)
    reference = Weights.of(autoencoder.state_dict(), world_size)
    for k in range(world_size):
        torch.testing.assert_close(y[k], decode(reference, k, z[0], length, innovations[k]))


@pytest.fixture
def kernels() -> Iterator[None]:
    """The number of threads and the use of oneDNN are as before afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.backends.mkldnn.set_flags(_enabled=True)


@pytest.mark.parametrize("length", [1, 100, 20_000])
@pytest.mark.usefixtures("kernels")
def test_what_is_decoded_exactly_is_the_same_with_other_kernels_and_near_the_usual(length: int) -> None:
    generator = torch.Generator().manual_seed(1)
    autoencoder = ServerAutoencoder(1, torch.Generator().manual_seed(0), lgc.Float32())
    (decoder,) = autoencoder.decoders
    assert isinstance(decoder, Decoder)
    torch.nn.init.normal_(decoder.out.weight, std=0.3, generator=generator)
    z = torch.randn(1, *latent_shape(length), generator=generator)
    innovation = torch.randn(1, length, generator=generator)
    results = []
    with torch.no_grad():
        usual = decoder(z, length, innovation)
        for number, mkldnn in [(1, True), (2, True), (3, False)]:
            torch.set_num_threads(number)
            torch.backends.mkldnn.set_flags(_enabled=mkldnn)
            results.append(decoder(z, length, innovation, exact=True))
        others = torch.cat([z, 100 * z, torch.full_like(z, torch.inf)])
        results.append(decoder(others, length, innovation, exact=True)[:1])  # whatever else is decoded with it
    for result in results:
        assert torch.equal(result, results[0])
    assert (usual - results[0]).norm() < 0.03 * usual.norm()


def test_the_precision_of_float32_may_be_set() -> None:
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    deterministic = torch.backends.cudnn.deterministic
    conv.fp32_precision = "ieee"  # torch.backends.cudnn.flags() then fails
    try:
        with replicated(torch.device("cpu")):
            assert torch.backends.cudnn.deterministic
    finally:
        conv.fp32_precision = "none"
    assert torch.backends.cudnn.deterministic == deterministic


def test_the_number_of_parameters_is_the_papers() -> None:
    ring = RingAutoencoder(torch.Generator().manual_seed(0), lgc.Float32())
    server = ServerAutoencoder(4, torch.Generator().manual_seed(0), lgc.Float32())
    assert sum(p.numel() for p in ring.parameters()) == 172_996 + 43_681
    assert sum(p.numel() for p in server.parameters()) == 172_996 + 4 * 43_682


@pytest.mark.parametrize("rate", [1e-6, 1e-3, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["heavy tails", "ties", "all zero", "large where the sample does not look"])
def test_the_largest_of_long_vectors_are_those_of_a_sort(kind: str, rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 2 * LONG + 1
    values = torch.randn(count, generator=generator) ** 5
    if kind == "ties":
        values = values.round()
    elif kind == "all zero":
        values = torch.zeros(count)
    elif kind == "large where the sample does not look":
        values[:: count // SAMPLES] = 0
    k = max(1, int(rate * count))
    indices = largest(values, k)
    assert torch.equal(indices, indices.unique())
    assert torch.equal(values[indices].abs().sort().values, values.abs().sort().values[-k:])
