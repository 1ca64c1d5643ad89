"""Transformers: a Trainer exchanges by a scheme, and its checkpoints have what each rank has of its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from launched import launched_by_accelerate
from ranks import Ranks
from torch import Tensor

RankFactory = Callable[[int], Ranks]

LOCAL = "local:every=3:start_steps=1+quantized"  # rounds after steps 4, 7 and 10
DGC = "dgc:rate=0.1:momentum=0"


class StoppedError(Exception):
    """Raised amid training, as by a user who interrupts it."""


class Noting(torch.optim.SGD):
    """An optimizer whose state has no mean."""

    def step(self, *_: Any) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["note"] = "made a step"


class Recorder:
    """What a rank sees in training: the anchor at every checkpoint and the losses of evaluations."""

    def __init__(self, trainer: Any, callback: Any, stop_at: int | None) -> None:
        from transformers import TrainerCallback

        recorder = self
        self.anchors: dict[int, dict[str, Tensor]] = {}
        self.own: dict[int, dict[str, Tensor]] = {}
        self.losses: list[float] = []

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == stop_at:
                    raise StoppedError

            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                recorder.own[state.global_step] = weights(trainer)
                with callback.handle.anchored():
                    recorder.anchors[state.global_step] = weights(trainer)

            def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
                recorder.losses.append(metrics["eval_loss"])

        trainer.add_callback(Callback())


def make(folder: Path, scheme: str, *, stop_at: int | None = None, **arguments: Any) -> tuple[Any, Any, Recorder]:
    """A Trainer of a tiny GPT-2, its callback, and what records it."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from lgc.integrations.transformers import LGCCallback

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8))
    tokens = torch.randint(16, (96, 8), generator=torch.Generator().manual_seed(1))
    examples = [{"input_ids": each, "labels": each} for each in tokens]
    defaults: dict[str, Any] = {
        "max_steps": 11,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "save_strategy": "no",
    }
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    args = TrainingArguments(str(folder), **(settings | defaults | arguments))
    trainer = Trainer(model, args, train_dataset=examples, eval_dataset=examples[:8])
    callback = LGCCallback(trainer, scheme)
    trainer.add_callback(callback)
    return trainer, callback, Recorder(trainer, callback, stop_at)


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in trainer.model.named_parameters()}


def moments(trainer: Any) -> dict[str, Tensor]:
    states = trainer.optimizer.optimizer.state.values()
    return {f"{number} {name}": each for number, state in enumerate(states) for name, each in state.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def saved(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def stop_and_resume(
    rank: int, world_size: int, folder: Path, scheme: str, arguments: dict[str, Any]
) -> tuple[list[str], dict[str, Tensor]]:
    """What differs between a run that was stopped and one that was not, and what this rank had at the checkpoint."""
    arguments = arguments | {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 1}
    with launched_by_accelerate(rank, world_size):
        whole, _, recorder = make(folder / "whole", scheme, **arguments)
        whole.train()
        stopped, *_ = make(folder / "stopped", scheme, stop_at=8, **arguments)
        with pytest.raises(StoppedError):
            stopped.train()
        assert differing(saved(folder / "stopped/checkpoint-5"), recorder.anchors[5]) == []
        resumed, callback, _ = make(folder / "stopped", scheme, **arguments)
        resumed.train(resume_from_checkpoint=True)
        assert sorted(path.name for path in (folder / "stopped").iterdir()) == ["checkpoint-11"]  # with its rest
        assert callback.handle.step == 11
        differs = differing(weights(whole), weights(resumed)) + differing(moments(whole), moments(resumed))
        return differs, recorder.own[5]


@pytest.mark.parametrize(
    ("scheme", "arguments"),
    [(DGC, {"activation_checkpointing": True}), (LOCAL, {"bf16": True, "gradient_accumulation_steps": 2})],
    ids=["dgc", "local"],
)
def test_a_training_that_was_stopped_goes_on_bit_for_bit(
    ranks: RankFactory, tmp_path: Path, scheme: str, arguments: dict[str, Any]
) -> None:
    (differs, first), (others, second) = ranks(2).run(stop_and_resume, tmp_path, scheme, arguments)
    assert differs == others == []
    assert bool(differing(first, second)) == (scheme == LOCAL)  # it was amid a round


def go_on(rank: int, world_size: int, folder: Path, steps: int) -> tuple[int, dict[str, Tensor]]:
    with launched_by_accelerate(rank, world_size):
        trainer, callback, _ = make(folder, LOCAL, max_steps=steps, save_strategy="steps", save_steps=6)
        trainer.train(resume_from_checkpoint=True if world_size == 3 else None)
        return callback.handle.step, weights(trainer)


@pytest.mark.exhaustive
def test_another_number_of_ranks_goes_on(ranks: RankFactory, tmp_path: Path) -> None:
    ranks(2).run(go_on, tmp_path, 6)
    (step, first), *others = ranks(3).run(go_on, tmp_path, 11)
    assert step == 11
    for _, other in others:
        assert differing(first, other) == []


def decide(rank: int, world_size: int, folder: Path) -> tuple[list[float], dict[str, Tensor], list[dict[str, Any]]]:
    from transformers import EarlyStoppingCallback

    with launched_by_accelerate(rank, world_size):
        evaluated: dict[str, Any] = {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        worst: dict[str, Any] = {
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "greater_is_better": True,
        }
        trainer, callback, recorder = make(folder, LOCAL, **evaluated, **worst)
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=3))
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        assert best.name != f"checkpoint-{trainer.state.global_step}"
        for step, anchor in recorder.anchors.items():
            assert differing(saved(folder / f"checkpoint-{step}"), anchor) == []
        assert callback.handle.is_detached
        assert differing(saved(best), weights(trainer)) == []
        history = trainer.state.log_history
        trainer.args.max_steps, trainer.args.load_best_model_at_end = 4, False
        trainer.pop_callback(EarlyStoppingCallback)
        trainer.train()
        assert callback.handle.step == 4
        trainer.save_model(folder / "end")
        return recorder.losses, weights(trainer), history


def test_under_local_steps_all_ranks_decide_alike_by_what_they_share(ranks: RankFactory, tmp_path: Path) -> None:
    (losses, first, history), (others, second, _) = ranks(2).run(decide, tmp_path)
    assert losses == others
    assert len(set(losses)) > 2
    assert differing(first, second) == []  # of the second training
    assert differing(saved(tmp_path / "end"), first) == []
    assert [log["lgc_ratio"] > 1 for log in history if "lgc_ratio" in log] == [True]
    assert [log["step"] for log in history if "loss" in log] == list(range(1, history[-1]["step"] + 1))


def refuse(rank: int, world_size: int, folder: Path) -> list[str]:
    def message(scheme: str, **arguments: Any) -> str:
        trainer, *_ = make(folder, scheme, max_steps=2, **arguments)
        with pytest.raises(ValueError, match=r"lgc|Arguments") as raised:
            trainer.train()
        return str(raised.value)

    with launched_by_accelerate(rank, world_size):
        if world_size == 1:
            with mock.patch.dict(os.environ):
                del os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]  # started as a plain script
                return [message(DGC)]
        compiled, callback, _ = make(
            folder, "dgc:rate=0.1", max_steps=2, optim="sgd", max_grad_norm=0, torch_compile_backend="eager"
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")  # dynamo's
            compiled.train()
        assert callback.handle.step == 2
        noting, callback, _ = make(folder, LOCAL, max_steps=2)
        noting.optimizer = Noting(noting.model.parameters())
        noting.train()
        assert callback.handle.is_detached
        assert not noting.optimizer.optimizer.state  # or another training would begin with what this rank alone has
        noting.remove_callback(callback)
        with pytest.raises(ValueError, match=r"not added to it, .*: trainer\.add_callback\(callback\)"):
            noting.train()
        return [message("dgc:rate=0.1", optim="sgd"), message(LOCAL, ddp_find_unused_parameters=True)]


def test_what_the_scheme_cannot_do_is_refused_by_name(ranks: RankFactory, tmp_path: Path) -> None:
    for clipped, unused in ranks(2).run(refuse, tmp_path):
        assert clipped.startswith("TrainingArguments(max_grad_norm=1.0) clips the mean after the round, while DGC has")
        assert "max_grad_norm=0; clip_norm of the scheme" in clipped
        assert unused.startswith("TrainingArguments(ddp_find_unused_parameters=True) makes DDP communicate at every")
    ((alone,),) = ranks(1).run(refuse, tmp_path)
    assert "is not distributed (DistributedType.NO)" in alone
