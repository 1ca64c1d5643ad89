"""The autoencoder by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import cases
from reference import Weights, decode, encode

import lgc
from lgc.rounds.autoencoder import Decoder, Doubling, RingAutoencoder, ServerAutoencoder, latent_shape, replicated

# A latent has one column for every 16 values.
every_length = cases("length", range(1, 201), in_suite=(*range(1, 50), 200))


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


@every_length
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


@every_length
def test_the_server_autoencoder_returns_every_length(length: int) -> None:
    world_size = 2
    autoencoder = ServerAutoencoder(world_size, torch.Generator().manual_seed(0), lgc.Float32(), 0.01)
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
    autoencoder = ServerAutoencoder(1, torch.Generator().manual_seed(0), lgc.Float32(), 0.01)
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
    server = ServerAutoencoder(4, torch.Generator().manual_seed(0), lgc.Float32(), 0.01)
    assert sum(p.numel() for p in ring.parameters()) == 172_996 + 43_681
    assert sum(p.numel() for p in server.parameters()) == 172_996 + 4 * 43_682
