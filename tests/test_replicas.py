"""Digests of what must be the same on all ranks."""

from __future__ import annotations

import pytest
import torch

from lgc.comm.replicas import digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_digest_taken_in_parts_tells_every_changed_word(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    tensor = (torch.arange(23) % 3).to(dtype)
    whole = digest(tensor)
    monkeypatch.setattr("lgc.comm.replicas.DIGEST_WORDS", 4)
    assert torch.equal(digest(tensor), whole)
    for place in range(len(tensor)):
        changed = tensor.clone()
        changed[place] = 1 - tensor[place].int()
        assert not torch.equal(digest(changed), whole)
