"""RecentSign: what Sign gives, in fewer bytes where signs are as expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lgc
from lgc.coding import PayloadError, RecentSign, Rice, Sign

COUNTS = [3, 0, 200, 57]


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.01, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=100, deadline=None)
def test_decodes_what_sign_decodes_in_at_most_a_byte_more(seed: int, flips: float, known: float) -> None:
    generator = np.random.default_rng(seed)
    values = torch.from_numpy(generator.standard_normal(sum(COUNTS)).astype(np.float32))
    values[torch.from_numpy(generator.random(sum(COUNTS)) < generator.choice([0.0, 0.1]))] = 0
    expected = values.sign().to(torch.int8)
    expected[torch.from_numpy(generator.random(sum(COUNTS)) < flips)] *= -1
    expected[torch.from_numpy(generator.random(sum(COUNTS)) >= known)] = 0
    codec, plain = RecentSign().given(expected), Sign().encode(values, COUNTS)
    code = codec.encode(values, COUNTS)
    assert torch.equal(codec.decode(code, COUNTS), Sign().decode(plain, COUNTS))
    assert code.numel() <= min(plain.numel() + 1, codec.bound(COUNTS))


def test_bytes_of_an_example() -> None:
    """Pinned, as in docs/wire.md."""
    values = torch.full((64,), 2.0)
    values[5] = -2
    expected = torch.ones(64, dtype=torch.int8)
    expected[60:] = 0
    codec = RecentSign().given(expected)
    first = Rice().encode(torch.tensor([5]), [60]).numpy().tobytes().hex()
    assert codec.encode(values, [64]).numpy().tobytes().hex() == "00" + "01" + "00000040" + "00" + "01000000" + first
    assert RecentSign().encode(values, [64]).numpy().tobytes()[1:2] == b"\x00"


def test_what_no_encoder_writes_is_refused() -> None:
    values = torch.ones(260)
    codec = RecentSign().given(torch.cat([torch.ones(250), torch.zeros(10)]).to(torch.int8))
    code = codec.encode(values, COUNTS).numpy().tobytes()
    signs = 2 + 4 * 3
    assert code[:2] == b"\x00\x01"
    for broken, field in (
        (code[:1], "values.model"),
        (code[:1] + b"\x02" + code[2:], "values.model"),
        (code[:signs], "values.signs"),
        (code[: signs + 1] + b"\xff" + code[signs + 2 :], "values.signs"),
        (code[: signs + 4], "values.signs"),
        (code[: signs + 2] + b"\xff" + code[signs + 3 :], "values.signs"),
        (code[:1] + b"\x00" + code[2:], "values"),
    ):
        with pytest.raises(PayloadError) as caught:
            codec.decode(broken, COUNTS)
        assert caught.value.field == field
    with pytest.raises(PayloadError, match=r"values\.model"):
        RecentSign().decode(code, COUNTS)


def test_text_form() -> None:
    assert lgc.parse_scheme("dgc:values=recentsign") == lgc.DGC(values=RecentSign())
    assert str(lgc.DGC(values=RecentSign())) == "dgc:values=recentsign"
