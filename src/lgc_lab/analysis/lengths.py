"""What a rank's selections cost in codes that know nothing, and in codes that know the earlier ones."""

from __future__ import annotations

import torch
from torch import Tensor

from lgc.coding import IndexCoder, Recent, RecentSign, Rice, Sign
from lgc.phase import Phase
from lgc.rounds.schedule import Stage
from lgc.rounds.selection import Region

CODES = ("rice", "recent", "sign", "recent_sign")


class CodeLengths:
    """Counts the bytes of one rank's own top-k, round after round, in four codes.

    They are given what `topk` and `dgc` give them; the payloads' headers are left out.

    Args:
        region: that is selected from.
        size: of the flat vector.
    """

    def __init__(self, region: Region, size: int) -> None:
        self._region = region
        self._coder: IndexCoder = Recent()
        self._signs = torch.zeros(size, dtype=torch.int8)
        self._octets = torch.zeros(len(CODES), dtype=torch.float64)
        self._entries = 0

    def count(self, v: Tensor, stage: Stage) -> None:
        """Code the top-k of `v` in a round, which is known from then on; what is sent in the warm-up is not counted."""
        positions = self._region.select(v, stage.least_rate)
        elements = self._region.elements(positions)
        sizes, counts = self._region.sizes, self._region.element_counts(stage.least_rate)
        values = v[elements].cpu()
        elements = elements.cpu()
        if stage.phase is not Phase.WARMUP:
            signs = RecentSign().given(self._signs[elements])
            index_codes = [coder.encode(positions, sizes) for coder in (Rice(), self._coder)]
            sign_codes = [codec.encode(values, counts) for codec in (Sign(), signs)]
            self._octets += torch.tensor([code.numel() for code in (*index_codes, *sign_codes)])
            self._entries += elements.numel()
        self._coder = self._coder.after(positions)
        self._signs[elements] = values.sign().to(torch.int8)

    def take(self) -> Tensor:
        """Bits per entry in the order of `CODES`, of the rounds since this was last called; zeros without any."""
        bits = 8 * self._octets / max(1, self._entries)
        self._octets, self._entries = torch.zeros_like(self._octets), 0
        return bits
