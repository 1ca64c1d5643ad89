"""Accelerate: what `prepare` returned trains under a scheme, and its checkpoints have what each rank has of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from launched import launched_by_accelerate
from ranks import Ranks
from torch import Tensor, nn

RankFactory = Callable[[int], Ranks]

LOCAL = "local:every=5:start_steps=1+quantized"
DGC = "dgc:rate=0.1:momentum=0"


class Training:
    """One rank's run of a model with batch norm and dropout, under AdamW, prepared and attached."""

    def __init__(self, rank: int, scheme: str, *, scaled: bool = False, **of_accelerator: Any) -> None:
        from accelerate import Accelerator

        from lgc.integrations.accelerate import attach

        self.rank = rank
        self.accelerator = Accelerator(cpu=True, **of_accelerator)
        if scaled:  # as on a GPU with mixed_precision="fp16"
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 4))
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
        prepared = self.accelerator.prepare(self.net, optimizer, scheduler)
        self.model, self.optimizer, self.scheduler = prepared
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="DDP broadcasts")
            self.handle = attach(self.accelerator, self.model, self.optimizer, scheme)
        torch.manual_seed(rank)

    def train(self, numbers: range) -> Training:
        for number in numbers:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * number + self.rank))
            with self.accelerator.accumulate(self.model):
                loss = self.model(x).square().mean()
                overflows = self.accelerator.scaler is not None and number == 9 and self.rank == 1
                self.accelerator.backward(loss * float("inf") if overflows else loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return self

    def own(self) -> dict[str, Tensor]:
        """Copies of everything that this rank trains: weights, buffers, moments, scale and rate."""
        tensors = {**dict(self.net.named_parameters()), **dict(self.net.named_buffers())}
        for index, state in enumerate(self.optimizer.optimizer.state.values()):
            tensors |= {f"{index} {name}": each for name, each in state.items()}
        if self.accelerator.scaler is not None:
            tensors["scale"] = torch.tensor(self.accelerator.scaler.get_scale())
        tensors["rate"] = torch.tensor(self.scheduler.get_last_lr(), dtype=torch.float64)
        return {name: each.detach().clone() for name, each in tensors.items()}

    def anchor(self) -> dict[str, Tensor]:
        with self.handle.anchored():
            return {name: each.clone() for name, each in self.net.state_dict().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def go_on(
    rank: int, world_size: int, folder: Path, scheme: str, arguments: dict[str, Any]
) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What differs after a stop, what this rank had at the stop, the anchor then, and the weights that were saved."""
    from safetensors.torch import load_file

    with launched_by_accelerate(rank, world_size):
        first = Training(rank, scheme, **arguments).train(range(3))
        first.accelerator.save_state(str(folder))
        first.train(range(3, 14))
        first.accelerator.save_state(str(folder))  # in the same place
        at_stop, anchor = first.own(), first.anchor()
        without_stop = first.train(range(14, 24)).own()
        second = Training(rank, scheme, **arguments).train(range(2))
        second.accelerator.load_state(str(folder))
        after_stop = second.train(range(14, 24)).own()
        saved = {name.removeprefix("module."): each for name, each in load_file(folder / "model.safetensors").items()}
        return differing(without_stop, after_stop), at_stop, anchor, saved


@pytest.mark.parametrize(
    ("scheme", "arguments"),
    [(DGC, {}), (LOCAL, {}), (LOCAL, {"scaled": True}), (LOCAL, {"gradient_accumulation_steps": 2})],
    ids=["dgc", "local", "local-fp16", "local-accumulated"],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    ranks: RankFactory, tmp_path: Path, scheme: str, arguments: dict[str, Any]
) -> None:
    results = ranks(2).run(go_on, tmp_path, scheme, arguments)
    for differs, _, anchor, saved in results:
        assert differs == []
        if scheme == LOCAL:
            assert differing(anchor, saved) == []
    (_, first, *_), (_, second, *_) = results
    assert ("0.weight" in differing(first, second)) == (scheme == LOCAL)  # it was stopped amid a round
    if arguments.get("scaled"):
        assert first["scale"] != second["scale"]
        assert first["rate"] != second["rate"]


def go_on_with_two(rank: int, world_size: int, folder: Path) -> list[str]:
    """What differs after a stop between two models of one accelerator, each under a scheme of its own."""
    from lgc.integrations.accelerate import attach

    class Two(Training):
        def __init__(self) -> None:
            super().__init__(rank, DGC)
            other = nn.Linear(8, 2)
            optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
            self.second, self.second_optimizer = self.accelerator.prepare(other, optimizer)
            attach(self.accelerator, self.second, self.second_optimizer, LOCAL)

        def train(self, numbers: range) -> Training:
            for number in numbers:
                super().train(range(number, number + 1))
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * number + self.rank))
                self.accelerator.backward(self.second(x).square().mean())
                self.second_optimizer.step()
                self.second_optimizer.zero_grad()
            return self

        def own(self) -> dict[str, Tensor]:
            return super().own() | {f"second {name}": each.clone() for name, each in self.second.state_dict().items()}

    with launched_by_accelerate(rank, world_size), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="between rounds model.state_dict")  # this rank's own is meant
        first = Two().train(range(8))
        first.accelerator.save_state(str(folder))
        without_stop = first.train(range(8, 14)).own()
        second = Two()
        second.accelerator.load_state(str(folder))
        return differing(without_stop, second.train(range(8, 14)).own())


def test_each_of_several_models_goes_on_under_its_scheme(ranks: RankFactory, tmp_path: Path) -> None:
    assert ranks(2).run(go_on_with_two, tmp_path) == [[], []]


def save_and_load(rank: int, world_size: int, folder: Path) -> list[str]:
    from safetensors.torch import load_file

    import lgc

    with launched_by_accelerate(rank, world_size):
        training = Training(rank, LOCAL, mixed_precision="bf16").train(range(5))
        accelerator = training.accelerator
        accelerator.save_model(training.model, folder / "model")
        accelerator.wait_for_everyone()
        assert differing(training.anchor(), load_file(folder / "model/model.safetensors")) == []
        messages = []
        with pytest.raises(TypeError) as registered:
            accelerator.register_for_checkpointing(training.handle)
        messages.append(str(registered.value))
        accelerator.save_state(str(folder / "state"))
        accelerator.wait_for_everyone()
        if rank == 0:
            (folder / "state/lgc").rename(folder / "elsewhere")
        with pytest.raises(lgc.checkpoint.CheckpointError) as missing:
            accelerator.load_state(str(folder / "state"))
        messages.append(str(missing.value))
        accelerator.free_memory()
        accelerator.save_state(str(folder / "after"))
        assert not (folder / "after/lgc").exists()
        return messages


def test_what_all_ranks_share_is_saved_and_every_rank_learns_what_is_missing(
    ranks: RankFactory, tmp_path: Path
) -> None:
    for registered, missing in ranks(2).run(save_and_load, tmp_path):
        assert (
            "would save rank 0's state alone; leave it out: save_state and load_state have every rank's" in registered
        )
        assert "state/lgc does not have every rank's state" in missing
        assert "to go on without what the ranks owed, call load_state before attach" in missing


def refuse(rank: int, world_size: int) -> list[str]:
    from accelerate.utils import DistributedType

    from lgc.integrations.accelerate import attach

    def message(error: type[Exception], model: nn.Module, scheme: str = DGC) -> str:
        with pytest.raises(error) as raised:
            attach(training.accelerator, model, training.optimizer, scheme)
        return str(raised.value)

    with launched_by_accelerate(rank, world_size):
        training = Training(rank, "dense")
        messages = [message(TypeError, training.net), message(TypeError, training.net, LOCAL)]
        with mock.patch.object(type(training.accelerator), "distributed_type", DistributedType.FSDP):
            messages.append(message(ValueError, training.model))
        with mock.patch.object(type(training.accelerator), "distributed_type", DistributedType.NO):
            messages.append(message(ValueError, training.net))
        return messages


def test_what_is_not_plain_data_parallel_is_refused_by_name(ranks: RankFactory) -> None:
    for bare, bare_local, fsdp, alone in ranks(2).run(refuse):
        assert bare == bare_local
        assert "must be what accelerator.prepare returned, a DistributedDataParallel model, got Sequential" in bare
        assert "is set to DistributedType.FSDP" in fsdp
        assert "is not distributed (DistributedType.NO)" in alone
        assert "torchrun --nproc-per-node 2" in alone
