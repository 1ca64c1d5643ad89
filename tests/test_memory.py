"""What schemes keep in memory from one step to the next, in bytes a parameter beside the model and the optimizer."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lgc

RankFactory = Callable[[int], Ranks]

SIDE = 256  # of the only weight, beside which nothing else counts
SLACK = 0.25  # bytes a parameter, of selected places and codes


def live_bytes() -> int:
    """Bytes of all memory that a tensor of this process has."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    dense = [each for each in tensors if each.layout == torch.strided]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in dense}
    return sum(storages.values())


def kept(rank: int, _: int, scheme: str, steps: int) -> float:
    """Bytes a parameter that are there after so many steps and were not without a scheme."""
    model = nn.Linear(SIDE, SIDE, bias=False)
    local = scheme.startswith("local")
    trained: nn.Module = model if local else DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(4, SIDE, generator=torch.Generator().manual_seed(rank))

    def train(steps: int) -> None:
        for _ in range(steps):
            trained(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    train(2)
    before = live_bytes()
    handle = lgc.attach(trained, scheme, optimizer)
    train(steps)
    handle.wire_summary()  # waits for a round that is under way
    return (live_bytes() - before) / SIDE**2


@pytest.mark.parametrize(
    ("scheme", "most"),
    [
        ("dgc:warmup_steps=1", 16),  # residual and momentum, each twice, so that a round can be abandoned
        ("topk", 8),
        ("quantized:reduction=two_stage", 8 + 4 / 2),  # and a server's residual of its shard
        ("scalecom:second_moment=0.99:warmup_steps=0", 24),
        # anchor, residual and outer momentum: nothing of the start, and nothing twice
        ("local:every=2:start_steps=2:outer_momentum=0.5", 12),
        ("local:every=2:start_steps=1:outer_momentum=0.5+quantized:reduction=two_stage", 12 + 4 / 2),
        ("local:every=2:start_steps=0:overlap=true+topk", 8 + 8),  # and a round under way: weights when it began, mean
    ],
)
def test_from_step_to_step_a_scheme_keeps_no_more_than_this(ranks: RankFactory, scheme: str, most: float) -> None:
    for found in ranks(2).run(kept, scheme, 5):
        assert most - SLACK < found <= most + SLACK, f"{scheme} keeps {found:.2f} bytes a parameter"


def go_back(rank: int, _: int) -> tuple[bool, bool]:
    """Whether a run that goes back into the start repeats itself, and whether its states have one form."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    handle = lgc.attach(model, "local:every=2:start_steps=3", optimizer)

    def train(first: int, end: int) -> None:
        for step in range(first, end):
            optimizer.zero_grad()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
            (model(x) - x.roll(1)).square().mean().backward()
            optimizer.step()

    def state() -> dict[str, Any]:
        return copy.deepcopy(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "handle": handle.state_dict()}
        )

    warnings.simplefilter("ignore")  # between rounds the model's state is this rank's own
    train(0, 2)
    early = state()
    train(2, 8)
    late = state()
    model.load_state_dict(early["model"])
    optimizer.load_state_dict(early["optimizer"])
    handle.load_state_dict(early["handle"])
    train(2, 8)
    again = state()
    same = all(torch.equal(each, again["model"][name]) for name, each in late["model"].items())
    return same, forms(early["handle"]["aggregator"]) == forms(late["handle"]["aggregator"])


def forms(state: Any) -> Any:
    """The keys of a nested state, and the shapes of its tensors."""
    if isinstance(state, dict):
        return {key: forms(each) for key, each in state.items()}
    return state.shape if isinstance(state, Tensor) else type(state)


def test_a_run_can_go_back_into_the_start_whose_memory_it_has_given_back(ranks: RankFactory) -> None:
    assert ranks(2).run(go_back) == [(True, True)] * 2
