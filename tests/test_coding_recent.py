"""Recent: positions given those of the last rounds. Exact, at most a byte too long, and nothing else decodes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lgc
from lgc.coding import IndexCoder, PayloadError, Recent, Rice

SIZES = [40, 0, 9, 300]
KINDS = ([1], [2], [3, 4], [5, 6, 7, 8])  # rounds ago

Positions = list[int]


def tensor(positions: Sequence[int]) -> Tensor:
    return torch.tensor(positions, dtype=torch.int64)


def after(past: Sequence[Positions]) -> IndexCoder:
    """The coder once these have been selected, the first one first."""
    coder: IndexCoder = Recent()
    for selected in past:
        coder = coder.after(tensor(selected))
    return coder


def counts_of(positions: Positions, sizes: Sequence[int]) -> list[int]:
    bounds = np.cumsum([0, *sizes]).tolist()
    return [sum(start <= position < stop for position in positions) for start, stop in pairwise(bounds)]


def relative_code(positions: Positions, past: Sequence[Positions], sizes: Sequence[int]) -> bytes:
    """The code in terms of the last rounds, by lists of all positions of a kind."""
    counts = counts_of(positions, sizes)
    segments = [range(*bound) for bound in pairwise(np.cumsum([0, *sizes]).tolist())]
    segments = [segment for segment, count in zip(segments, counts, strict=True) if count]
    ages: dict[int, int] = {}
    for rounds, selected in enumerate(reversed(past), 1):
        ages = dict.fromkeys(selected, rounds) | ages
    known = [sorted(p for p, age in ages.items() if age in kind) for kind in KINDS]
    all_known = set(chain(*known))
    end = max([max(all_known) + 1, *(segment.stop for segment in segments)])
    near = [p for p in range(end) if p not in all_known and any(abs(p - q) <= 4 for q in all_known)]
    far = [[p for p in segment if p not in all_known and p not in near] for segment in segments]
    again = [[p for p in kind if p in positions] for kind in known]
    marked = [
        [p for p in kind if (p not in found) == (2 * len(found) > len(kind))]
        for kind, found in zip(known, again, strict=True)
    ]
    neighbours = [p for p in near if p in positions]
    first = rice([*known, near], [*marked, neighbours])
    others = rice(far, [[p for p in segment if p in positions] for segment in far])
    width = max(1, -(-(8 * Rice().bound(sizes, counts)).bit_length() // 8))
    numbers = [len(found).to_bytes(width, "little") for found in [*again, neighbours, first]]
    return b"".join([b"\x01", *numbers, first, others])


def rice(among: Sequence[Positions], chosen: Sequence[Positions]) -> bytes:
    """Rice code of the places of what is chosen, one segment for each list."""
    starts = np.cumsum([0, *map(len, among)]).tolist()
    places = [
        start + whole.index(p) for start, whole, part in zip(starts[:-1], among, chosen, strict=True) for p in part
    ]
    return Rice().encode(tensor(places), [len(whole) for whole in among]).numpy().tobytes()


@st.composite
def selections(draw: st.DrawFn) -> tuple[list[Positions], Positions]:
    """What was selected in the last rounds, and what is selected now: some of it, some of its neighbours, others."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    densities = st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.9, 1.0])
    past, now = [], np.zeros(0, np.int64)
    for _ in range(draw(st.integers(1, 20))):
        again = now[generator.random(now.size) < draw(densities)]
        near = (now + generator.integers(-6, 7, now.size))[generator.random(now.size) < draw(densities)]
        others = np.flatnonzero(generator.random(sum(SIZES)) < draw(densities) / 4)
        now = np.unique(np.concatenate([again, near.clip(0, sum(SIZES) - 1), others]))
        past.append(now.tolist())
    return past[:-1], past[-1]


@given(selections())
@settings(max_examples=80, deadline=None)
def test_decodes_what_it_encoded_in_at_most_a_byte_more_than_rice(case: tuple[list[Positions], Positions]) -> None:
    past, positions = case
    coder, counts = after(past), counts_of(positions, SIZES)
    code = coder.encode(tensor(positions), SIZES)
    assert coder.decode(code, SIZES, counts).tolist() == positions
    assert code.numel() <= min(coder.bound(SIZES, counts), Rice().encode(tensor(positions), SIZES).numel() + 1)
    if code[0] == 1:
        assert code.numpy().tobytes() == relative_code(positions, past, SIZES)


@given(selections())
@settings(max_examples=25, deadline=None)
def test_decodes_what_a_plain_reference_encoded(case: tuple[list[Positions], Positions]) -> None:
    past, positions = case
    past, counts = [*past, [348]], counts_of(positions, SIZES)
    code = relative_code(positions, past, SIZES)
    if len(code) <= after(past).bound(SIZES, counts):
        assert after(past).decode(code, SIZES, counts).tolist() == positions


@given(selections())
@settings(max_examples=25, deadline=None)
def test_what_a_coder_knows_makes_the_same_coder_elsewhere(case: tuple[list[Positions], Positions]) -> None:
    past, positions = case
    coder, size = after(past), sum(SIZES)
    same = Recent().knowing(coder.known(size), size)
    assert same.digest() == coder.digest()
    assert torch.equal(same.encode(tensor(positions), SIZES), coder.encode(tensor(positions), SIZES))
    assert same.after(tensor(positions)).known(size) == coder.after(tensor(positions)).known(size)


def test_a_digest_tells_apart_what_was_selected_and_when() -> None:
    pasts: list[list[Positions]] = [[], [[1, 5]], [[1, 6]], [[1, 5], []], [[1], [5]], [[5], [1]]]
    assert len({after(past).digest() for past in pasts}) == len(pasts)


def test_positions_beyond_32_bits_are_coded_as_others() -> None:
    lengths = []
    for first in (2**10, 2**33):
        sizes, positions = [first, 2**20], [7, *range(first, first + 450, 9), first + 901]
        coder = Recent().after(tensor([5, *range(first, first + 900, 9)]))
        code = coder.encode(tensor(positions), sizes)
        assert code[0] == 1
        assert coder.decode(code, sizes, [1, len(positions) - 1]).tolist() == positions
        lengths.append(code.numel())
    assert lengths[1] - lengths[0] < 4  # but for the one gap of so many bits more


def test_bytes_of_two_examples() -> None:
    """Pinned, as in docs/wire.md."""
    last, positions = list(range(0, 4000, 40)), sorted({*range(0, 4000, 40), 1003, 2020} - {1000})
    assert (
        after([last]).encode(tensor(positions), [4000]).numpy().tobytes().hex()
        == "016300000000000000010003009932031d0601"
    )
    assert Recent().encode(tensor([1, 5, 14]), [16]).numpy().tobytes().hex() == "000d13"


def test_half_of_the_last_selection_again_costs_two_thirds_of_rice() -> None:
    generator = np.random.default_rng(0)
    last = np.unique(generator.integers(0, 1_000_000, 10_000))
    now = np.unique(np.concatenate([last[::2], generator.integers(0, 1_000_000, 5_000)]))
    plain = Rice().encode(torch.from_numpy(now), [1_000_000]).numel()
    coder = Recent().after(torch.from_numpy(last))
    assert coder.encode(torch.from_numpy(now), [1_000_000]).numel() < 0.7 * plain


def test_a_coder_is_a_value_and_the_others_know_nothing_of_the_past() -> None:
    selected = list(range(0, 900, 9))
    plain = Rice().encode(tensor(selected), [1000]).numel()
    coder = Recent()
    known = coder.after(tensor(selected))
    assert coder == known
    assert known.encode(tensor(selected), [1000]).numel() < plain / 2
    assert coder.encode(tensor(selected), [1000]).numel() == plain + 1
    for other in (Rice(), lgc.RawIndices()):
        assert other.after(tensor(selected)) is other


def test_what_was_selected_more_than_8_rounds_ago_is_forgotten() -> None:
    selected = list(range(0, 900, 9))
    for rounds, model in ((7, 1), (8, 0)):
        assert after([selected, *[[5]] * rounds]).encode(tensor(selected), [1000])[0] == model


def refused(coder: IndexCoder, code: bytes, counts: Sequence[int]) -> str:
    with pytest.raises(PayloadError) as caught:
        coder.decode(code, SIZES, counts)
    return caught.value.field


def test_what_no_encoder_writes_is_refused() -> None:
    last, positions = list(range(0, 300, 3)), [*range(0, 150, 3), 200, 340]  # the numbers take a byte each
    coder, counts = after([last]), counts_of(positions, SIZES)
    code = coder.encode(tensor(positions), SIZES).numpy().tobytes()
    assert code[0] == 1
    assert refused(coder, b"", counts) == "indices.model"
    assert refused(coder, b"\x02" + code[1:], counts) == "indices.model"
    assert refused(Recent(), code, counts) == "indices.model"
    assert refused(coder, code[:6], counts) == "indices.numbers"
    for place in range(1, 7):
        assert refused(coder, code[:place] + b"\xff" + code[place + 1 :], counts) == "indices.numbers"
    assert refused(coder, code[:1] + b"\x64" + code[2:], counts) == "indices.numbers"
    assert refused(coder, code, [0, 0, 0, len(positions)]) == "indices.known"


def test_what_no_coder_knows_is_refused() -> None:
    known = after([[1, 5, 8], [2, 5]]).known(9)
    ages = np.array([1, 1, 0, 0, 0, 0, 0, 0], "<u8").tobytes()
    twice = ages + Rice().encode(tensor([1, 9 + 1]), [9] * 8).numpy().tobytes()  # position 1, of both ages
    for broken, field in (
        (known[:63], "known.numbers"),
        (b"\xff" + known[1:], "known.numbers"),
        (known[:7] + b"\xff" + known[8:], "known.numbers"),
        (known + b"\0", "indices"),
        (twice, "known.positions"),
    ):
        with pytest.raises(PayloadError) as caught:
            Recent().knowing(broken, 9)
        assert caught.value.field == field
    with pytest.raises(PayloadError, match="known must be 0 bytes"):
        Rice().knowing(known, 9)


def test_text_form() -> None:
    assert str(lgc.DGC(indices=Recent())) == "dgc:indices=recent"
    assert lgc.parse_scheme("dgc:indices=recent") == lgc.DGC(indices=Recent())
