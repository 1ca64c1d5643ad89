"""Recording, measuring and reporting what workers' gradients have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from ranks import Ranks
from runs import SMALL

from lgc.coding import Recent, Sign
from lgc.phase import Phase
from lgc.rounds.layout import POOL, Role, Segment
from lgc.rounds.schedule import Stage
from lgc.rounds.selection import Region
from lgc_lab.analysis.command import PAGE, ROWS, analyze
from lgc_lab.analysis.estimators import (
    Floats,
    Integers,
    kraskov_mutual_information,
    log_binomial,
)
from lgc_lab.analysis.indices import IndexCosts
from lgc_lab.analysis.lengths import CodeLengths
from lgc_lab.analysis.record import RECORDING, Layer, Recording, record
from lgc_lab.analysis.redundancy import divide_by_scale, measure_redundancy, overlap
from lgc_lab.training.settings import Settings

EVERYTHING = 10**7
SIZE, BLOCK, ENTRIES, WORKERS, RECORDS = 20_000, 10, 200, 4, 8


def synthetic(
    own: Integers,
    *,
    sent: list[Integers] | None = None,
    correlation: float = 0.0,
    generator: np.random.Generator,
) -> Recording:
    """One layer of `SIZE` coordinates with normal values: one part that all workers share and one of their own."""

    def values(*shape: int) -> Floats:
        common = generator.standard_normal((*shape[:-2], 1, shape[-1]))
        private = generator.standard_normal(shape)
        return np.float32(math.sqrt(correlation) * common + math.sqrt(1 - correlation) * private)  # type: ignore[return-value]

    records, workers, entries = own.shape
    places = [np.empty(0, dtype=np.int64)] * (records + 1) if sent is None else sent
    return Recording(
        settings={"recipe": "synthetic", "world_size": workers, "batch_size": 1, "scheme": "scalecom"},
        layers=[Layer("weight", 0, SIZE, 10 * BLOCK, BLOCK, 4000)],
        coordinates=np.arange(4000),
        steps=np.arange(1, records + 1),
        gradient=values(records, 2, workers, 4000),  # type: ignore[arg-type]
        accumulator=values(records, 2, workers, 4000),  # type: ignore[arg-type]
        own=own,
        shared=values(records, workers, entries),  # type: ignore[arg-type]
        momentum=np.zeros((records, 4000), dtype=np.float32),
        lengths=np.tile([8.0, 6.0, 1.2, 0.5], (records, workers, 1)),
        sent=[(where, np.ones(len(where), dtype=np.float32)) for where in places],
        seconds={"training": 1.0, "recording": 0.0},
        warmup_end=0,
        total_steps=records + 1,
    )


def selections(generator: np.random.Generator, among: Integers | None = None) -> Integers:
    """Every worker's own indices at every record, drawn from all coordinates or from some, shape (T, K, k)."""
    pool = np.arange(SIZE) if among is None else among
    return np.array(
        [[np.sort(generator.choice(pool, ENTRIES, replace=False)) for _ in range(WORKERS)] for _ in range(RECORDS)]
    )


def last_costs(recording: Recording) -> dict[str, float]:
    costs = IndexCosts(recording)
    return [costs.costs(record) for record in range(RECORDS)][-1]


def bits(n: int, k: int) -> float:
    return float(log_binomial(n, k)) / math.log(2)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(3)


def test_indices_without_a_pattern_cost_as_much_whatever_is_known(generator: np.random.Generator) -> None:
    sent = [np.sort(generator.choice(SIZE, ENTRIES, replace=False)) for _ in range(RECORDS + 1)]
    costs = last_costs(synthetic(selections(generator), sent=sent, generator=generator))
    uniform = bits(SIZE, ENTRIES) / ENTRIES
    assert costs["uniform"] == costs["layer"] == pytest.approx(uniform)
    for known in ("independent", "recency", "magnitude", "row", "output", "past", "kernel", "worker"):
        assert costs[known] == pytest.approx(uniform, abs=0.15), known
        assert costs[f"{known}_plug_in"] <= costs[known] + 0.02, known


def test_indices_that_repeat_cost_less_given_recency(generator: np.random.Generator) -> None:
    """All selections are in the same quarter, which was sent in the step before."""
    quarter = np.sort(generator.choice(SIZE, SIZE // 4, replace=False))
    recording = synthetic(selections(generator, quarter), sent=[quarter] * (RECORDS + 1), generator=generator)
    costs = last_costs(recording)
    assert costs["independent"] - costs["recency"] == pytest.approx(2, abs=0.05)
    assert costs["past"] == pytest.approx(costs["recency"], abs=0.05)


def test_indices_that_fill_kernels_cost_one_index_a_kernel(generator: np.random.Generator) -> None:
    def draw() -> Integers:
        blocks = generator.choice(SIZE // BLOCK, ENTRIES // BLOCK, replace=False)
        return np.sort((blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel())

    own = np.array([[draw() for _ in range(WORKERS)] for _ in range(RECORDS)])
    costs = last_costs(synthetic(own, generator=generator))
    assert costs["kernel"] == pytest.approx(bits(SIZE // BLOCK, ENTRIES // BLOCK) / ENTRIES, abs=0.05)


def test_indices_that_all_workers_select_cost_nothing_given_another_worker(generator: np.random.Generator) -> None:
    own = np.repeat(selections(generator)[:, :1], WORKERS, axis=1)
    costs = last_costs(synthetic(own, generator=generator))
    assert costs["worker"] < 0.05
    assert overlap(own[0]) == 1


@pytest.mark.parametrize("correlation", [pytest.param(0.0, marks=pytest.mark.exhaustive), 0.8])
def test_measured_information_is_that_of_the_values(correlation: float, generator: np.random.Generator) -> None:
    recording = synthetic(selections(generator), correlation=correlation, generator=generator)
    rows = list(measure_redundancy(recording))
    truth = -0.5 * math.log2(1 - correlation**2)
    for row in (row for row in rows if row["kind"] != "index"):
        tolerance = 0.03 if row["kind"] == "layer" else 0.1  # 200 entries of 3 pairs, 4000 samples of 2 pairs
        for name in ("histogram_mutual_information", "kraskov_mutual_information"):
            assert abs(row[name] - truth) < max(tolerance, 4 * row[f"{name}_error"]), (name, row)
        assert row["pearson"] == pytest.approx(correlation, abs=5 * row["pearson_error"])
        assert abs(row["shuffled_mutual_information"]) < max(tolerance, 4 * row["shuffled_mutual_information_error"])
    disagree = math.acos(correlation) / math.pi
    signs = 1 + disagree * math.log2(disagree) + (1 - disagree) * math.log2(1 - disagree)
    layers = [row for row in rows if row["kind"] == "layer"]
    assert np.mean([row["sign_mutual_information"] for row in layers]) == pytest.approx(signs, abs=0.01)
    assert np.mean([row["sign_agreement"] for row in layers]) == pytest.approx(1 - disagree, abs=0.01)


def test_entropy_of_normal_values_is_their_rate_at_one_per_cent_error(generator: np.random.Generator) -> None:
    """A uniform quantiser with an ideal coder needs a quarter of a bit more than 1/2 log2(100)."""
    row = next(measure_redundancy(synthetic(selections(generator), generator=generator)))
    assert row["entropy"] == pytest.approx(0.5 * math.log2(100) + 0.25, abs=0.05)


def test_scales_of_channels_are_divided_out(generator: np.random.Generator) -> None:
    """Both workers have the same scale for every output and input, and nothing else in common."""
    layer = Layer("weight", 100, 64 * 32 * 9, 32 * 9, 9, 64 * 32 * 9)
    scale = np.exp(generator.standard_normal((64, 1, 1)) + generator.standard_normal((1, 32, 1)))
    values = np.float32(scale * generator.standard_normal((2, 64, 32, 9))).reshape(2, -1)
    unscaled = divide_by_scale(values, layer, 100 + np.arange(layer.size))
    assert unscaled is not None
    assert kraskov_mutual_information(values[0], values[1], generator).value > 0.2
    assert abs(kraskov_mutual_information(unscaled[0], unscaled[1], generator).value) < 0.03
    few = np.sort(generator.choice(layer.size, 500, replace=False))  # of 64 outputs and 32 inputs
    assert divide_by_scale(values[:, few], layer, 100 + few) is None


def test_codes_are_measured_as_they_are_sent(generator: np.random.Generator) -> None:
    """Rounds of the warm-up teach and do not count; in the two after it the first selection is sent again."""
    region = Region([Segment("weight", Role.OWN, slice(0, SIZE), ENTRIES / SIZE)])
    lengths = CodeLengths(region, SIZE)
    again, other = torch.from_numpy(generator.standard_normal((2, SIZE)).astype(np.float32))
    lengths.count(again, Stage(0, Phase.WARMUP, 4 * ENTRIES / SIZE))
    assert lengths.take().tolist() == [0, 0, 0, 0]
    for step, v in enumerate([other, again], 1):
        lengths.count(v, Stage(step, Phase.COMPRESSED))
    positions, values = region.select(again), again[region.select(again)]
    known = Recent().after(region.select(again, 4 * ENTRIES / SIZE)).after(region.select(other))
    recent = known.encode(positions, [SIZE]).numel()
    rice, both, sign, recent_sign = (ENTRIES * lengths.take() / 8 * 2).tolist()
    lengths.count(again, Stage(3, Phase.COMPRESSED))
    assert sign == 2 * Sign().encode(values, [ENTRIES]).numel()
    assert recent < both < rice
    assert recent_sign < sign
    assert lengths.take()[1] < 1  # nothing is new


def record_small(rank: int, world_size: int, scheme: str, out: Path) -> None:
    settings = Settings(recipe=SMALL, scheme=scheme, world_size=world_size, steps=7, batch_size=8)
    record(settings, out, 3, EVERYTHING, torch.device("cpu"))


@pytest.mark.parametrize("low_pass", [1, 0.1])
def test_recording_has_what_every_worker_would_send(
    ranks: Callable[[int], Ranks], low_pass: float, tmp_path: Path
) -> None:
    scheme = f"scalecom:values=float32:rate=0.01:pooled_rate=0.01:warmup_steps=0:low_pass={low_pass}"
    ranks(2).run(record_small, scheme, tmp_path)
    recording = Recording.load(tmp_path / RECORDING)
    size = sum(layer.size for layer in recording.layers)
    assert recording.steps.tolist() == [3, 6]
    assert np.array_equal(recording.coordinates, np.arange(size))
    assert recording.layers[-1].name != POOL
    assert recording.total_steps == len(recording.sent) == 7
    for number, step in enumerate(recording.steps.tolist()):
        v = recording.accumulator[number, 1]
        leader = recording.leader(number)
        indices = recording.own[number, leader]
        assert np.array_equal(recording.shared[number], v[:, indices])
        for worker, own in enumerate(recording.own[number]):
            for layer in recording.layers:
                inside = own[(own >= layer.start) & (own < layer.start + layer.size)]
                magnitudes = np.abs(v[worker, layer.start : layer.start + layer.size])
                sent, unsent = magnitudes[inside - layer.start], np.delete(magnitudes, inside - layer.start)
                assert len(inside) == max(1, round(0.01 * layer.size))
                assert sent.min() >= unsent.max()
        where, values = recording.sent[step]
        assert np.isin(where, indices).all()
        assert values == pytest.approx(v[:, where].mean(axis=0), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    "scheme",
    [
        "topk:values=float32:rate=1:momentum=0",
        "local:every=1:start_steps=0+topk:values=float32:rate=1",  # what was moved in place of gradients
    ],
)
def test_recorded_accumulators_are_the_gradients_where_all_is_sent(
    ranks: Callable[[int], Ranks], scheme: str, tmp_path: Path
) -> None:
    ranks(2).run(record_small, scheme, tmp_path)
    recording = Recording.load(tmp_path / RECORDING)
    assert np.array_equal(recording.gradient, recording.accumulator)
    assert not np.array_equal(recording.gradient[:, :, 0], recording.gradient[:, :, 1])


def test_outer_momentum_is_recorded_as_all_ranks_hold_it(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """It is 0.5 times itself plus the mean of what the ranks have moved, since everything is sent."""
    ranks(2).run(record_small, "local:every=1:start_steps=0:outer_momentum=0.5+topk:values=float32:rate=1", tmp_path)
    recording = Recording.load(tmp_path / RECORDING)
    expected: Floats = np.zeros(len(recording.coordinates))
    for where, values in recording.sent[:6]:
        expected = 0.5 * expected + np.bincount(where, values, minlength=len(recording.coordinates))
    assert recording.momentum[1] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    accumulator = next(row for row in measure_redundancy(recording) if row["quantity"] == "accumulator")
    assert 0 < accumulator["momentum_pearson"] < 1


def test_command_writes_recording_rows_and_page(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--recipe=digits", "--workers=2", "--batch-size=16", "--every=3", "--steps=13", "--samples=256"]
    options += ["--scheme=scalecom:rate=0.01:warmup_steps=4", f"--out={out}"]
    result = CliRunner().invoke(analyze, options)
    assert result.exit_code == 0, result.output
    assert "index: time since last sent" in result.output
    assert "recording took" in result.output
    rows = [json.loads(line) for line in (out / ROWS).read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"layer", "shared", "index"}
    page = (out / PAGE).read_text()
    assert page.count("<svg") == 6
    assert 'href="http' not in page
    assert "<script" not in page
    again = CliRunner().invoke(analyze, options)
    assert again.exit_code == 2
    assert "has an analysis; choose another --out, or --overwrite" in again.output
    (out / PAGE).unlink()  # as if the evaluation had been interrupted
    assert CliRunner().invoke(analyze, options).exit_code == 2
    assert (out / RECORDING).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme=lgc-ring"], "or local steps that exchange by topk or scalecom, got lgc-ring"),
        (["--scheme=dense"], "or local steps that exchange by topk or scalecom, got dense"),
        (["--scheme=scalecom:rate=2"], "ScaleCom(rate=...) must be in (0, 1], got 2"),
        (["--scheme=topk:rate=1"], "rate must be below 1"),
        (["--every=50", "--steps=60"], "--every 50 leaves fewer than 2 records in 60 rounds"),
        (["--every=20", "--steps=60", "--scheme=dgc:warmup_steps=30"], "in 60 rounds, of which 30 are the warm-up"),
        (["--every=5", "--steps=60", "--scheme=local:every=6:start_steps=0+topk"], "2 records in 10 rounds"),
        (["--scheme=local:fragments=2+topk"], "overlap=False and fragments=1"),
        (["--data=/nowhere"], "digits"),
    ],
)
def test_command_refuses_before_anything_starts(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(analyze, ["--recipe=digits", f"--out={tmp_path / 'run'}", *options])
    assert result.exit_code != 0
    assert message in result.output
    assert not (tmp_path / "run").exists()
