"""Lightning: `trainer.fit` under a scheme, which its checkpoints, validation and best model know of."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import cases
from launched import launched
from ranks import Ranks
from runs import ENVIRONMENT, LIMIT_S, TORCHRUN
from torch import Tensor

import lgc

RankFactory = Callable[[int], Ranks]
Weights = dict[str, Tensor]

JOB = Path(__file__).parent / "support" / "lightning_job.py"
DGC = "dgc:rate=0.1:momentum=0"
LOCAL = "local:every=4:start_steps=0+quantized"
OF_ALL = "local:every=4:start_steps=0:first_moments=0.5:second_moments=all:ahead=0.5+quantized"
OF_LIGHTNING = (  # what it says of a small run, and what it uses of torch
    ".*does not have many workers",
    ".*smaller than the logging interval",
    "Checkpoint directory .* exists",
    ".*isinstance.treespec, LeafSpec.",
    ".*val_dataloader` does not",
    ".*resuming from a checkpoint that ended before the epoch ended",
    ".*sync_dist=True",
    "Be aware that when using `ckpt_path`",
    "Found .* in eval mode at the start of training",
)


def job() -> Any:
    """The module that runs under Lightning, imported where it is needed: Lightning takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning_job
    return lightning_job


@contextlib.contextmanager
def watched(rank: int, world_size: int) -> Iterator[list[str]]:
    """A rank that torchrun has started; the warnings that lgc logs."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lgc")
    logger.addHandler(handler)
    try:
        with launched(rank, world_size), warnings.catch_warnings():
            for message in OF_LIGHTNING:
                warnings.filterwarnings("ignore", message=message)
            yield said
    finally:
        logger.removeHandler(handler)


def differing(one: Weights, other: Weights) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


class Stopped(NamedTuple):
    """A run that was stopped amid a round: what it had then, and what differs after."""

    differs: list[list[str]]
    steps: int
    at_stop: Weights
    last_round: Weights
    saved: dict[str, Any]
    said: list[str]


def stop_and_go_on(rank: int, world_size: int, folder: Path, scheme: str, options: dict[str, Any]) -> Stopped:
    with watched(rank, world_size) as said:
        whole = job().Training(folder, scheme, **options).fit(10, save_every=6)
        path = folder / "saved-step=6.ckpt"
        stopped = job().Training(folder, scheme, **options).fit(10, ckpt_path=path, weights_only=True)
        saved = torch.load(path, weights_only=True)
    own, again = whole.module.seen, stopped.module.seen
    again.pop(6, None)  # after a batch that is only accumulated
    own.pop(0, None)  # the same
    assert sorted(again) == [7, 8, 9, 10]
    return Stopped([differing(own[step], again[step]) for step in again], len(own), own[6], own[4], saved, said)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dgc": (DGC, {"buffers_every": 2}),
    "dgc-sgd-accumulated": ("dgc:rate=0.1", {"accumulate_grad_batches": 2, "buffers_every": 2}),
    "local": (LOCAL, {}),
    "local-overlap-bf16": ("local:every=4:start_steps=0:overlap=true+quantized", {"precision": "bf16-mixed"}),
    "local-fp16": (LOCAL, {"precision": "16-mixed"}),
}


@cases("case", CASES, in_suite=["dgc-sgd-accumulated", "local-fp16"])
def test_a_run_that_was_stopped_amid_a_round_goes_on_bit_for_bit(ranks: RankFactory, tmp_path: Path, case: str) -> None:
    first, second = ranks(2).run(stop_and_go_on, tmp_path, *CASES[case], limit_s=LIMIT_S)
    for run in (first, second):
        assert run.differs == [[]] * 4
        assert run.steps == 10
        assert run.said == []
        assert len(run.saved["lgc"]) == 2
    shared = {name: each for name, each in first.saved["state_dict"].items() if name in first.at_stop}
    if case.startswith("local"):
        assert differing(first.at_stop, second.at_stop) != []
    if case in ("local", "local-fp16"):
        assert differing(shared, first.last_round) == differing(shared, second.last_round) == []
    if case.startswith("dgc"):
        names = {name for name in shared if "running" not in name}
        assert not names & set(differing(shared, first.at_stop))
        assert not names & set(differing(first.at_stop, second.at_stop))


def go_on_with_fewer(rank: int, world_size: int, folder: Path) -> tuple[int, Weights]:
    with watched(rank, world_size):
        training = (
            job()
            .Training(folder, LOCAL)
            .fit(
                6 if world_size == 2 else 7,
                save_every=6,
                **({} if world_size == 2 else {"ckpt_path": folder / "saved-step=6.ckpt"}),
            )
        )
    return training.module.steps_at_start, training.module.seen[6] if world_size == 2 else training.module.at_start


def test_on_another_number_of_ranks_a_run_goes_on_from_the_mean(ranks: RankFactory, tmp_path: Path) -> None:
    (began, first), (_, second) = ranks(2).run(go_on_with_fewer, tmp_path, limit_s=LIMIT_S)
    ((goes_on, alone),) = ranks(1).run(go_on_with_fewer, tmp_path)
    assert (began, goes_on) == (0, 6)
    torch.testing.assert_close(alone["body.0.weight"], (first["body.0.weight"] + second["body.0.weight"]) / 2)


class Validated(NamedTuple):
    """What one rank has seen of validation, and chosen."""

    seen: list[Weights]
    rounds: list[Weights]
    best: float
    score_of_best: float
    weights_only: Weights
    stopped_at: int


def validate(rank: int, world_size: int, folder: Path) -> Validated:
    with watched(rank, world_size):
        training = job().Training(folder, LOCAL).fit(20, validate_every=3, monitor=True)
        module = training.module
        best = training.checkpoint.best_model_path
        saved = torch.load(best, weights_only=True)
        module.load_state_dict(saved["state_dict"])
        module.eval()
        score = float(module.validation_loss().detach())
    rounds = [module.seen[step] for step in sorted(module.seen) if step % 4 == 0]
    weights_only = torch.load(training.weights_only.best_model_path, weights_only=True)["state_dict"]
    last = max(module.seen)
    return Validated(module.validated, rounds, float(training.checkpoint.best_model_score), score, weights_only, last)


def test_validation_the_best_model_and_early_stopping_go_by_what_all_ranks_share(
    ranks: RankFactory, tmp_path: Path
) -> None:
    first, second = ranks(2).run(validate, tmp_path, limit_s=LIMIT_S)
    assert len(first.seen) == len(second.seen) >= 3
    assert [differing(one, other) for one, other in zip(first.seen, second.seen, strict=True)] == [[]] * len(first.seen)
    assert differing(first.seen[2], first.rounds[0]) == []  # after step 6: that of step 4
    for rank in (first, second):
        assert rank.best == rank.score_of_best
        assert differing({name: rank.weights_only[name] for name in rank.rounds[-1]}, rank.seen[-1]) == []
    assert first.stopped_at == second.stopped_at < 20


class Fits(NamedTuple):
    """What several calls of `fit` have left."""

    summaries: list[dict[str, Any]]
    logged: dict[str, float]
    metrics: dict[str, float]
    weights: Weights
    steps_at_start: int
    said: list[str]


def fit_again(rank: int, world_size: int, folder: Path, scheme: str) -> Fits:
    with watched(rank, world_size) as said:
        training = job().Training(folder, scheme, buffers_every=None if scheme == OF_ALL else 2)
        summaries = [training.fit(6, logs=True).callback.wire_summary]
        logged = job().logged_in(folder) if rank == 0 else {}
        metrics = {name: float(value) for name, value in training.trainer.callback_metrics.items()}
        training.trainer.save_checkpoint(folder / "after.ckpt")
        weights = {name: each.clone() for name, each in training.module.state_dict().items()}
        summaries.append(training.fit(9).callback.wire_summary)  # the same callback and module, anew
        other = job().Training(folder, scheme, module=training.module, buffers_every=None if scheme == OF_ALL else 2)
        summaries.append(other.fit(9, ckpt_path=folder / "after.ckpt").callback.wire_summary)
        assert training.callback.handle is other.callback.handle is None
    return Fits(summaries, logged, metrics, weights, other.module.steps_at_start, said)


@pytest.mark.parametrize("scheme", [DGC, OF_ALL], ids=["dgc", "local"])
def test_fit_can_be_called_again_with_the_same_callback_and_with_another(
    ranks: RankFactory, tmp_path: Path, scheme: str
) -> None:
    first, second = ranks(2).run(fit_again, tmp_path, scheme, limit_s=LIMIT_S)
    assert differing(first.weights, second.weights) == []
    assert first.summaries == second.summaries
    assert [sum(phase["steps"] for phase in each["phases"]) for each in first.summaries] == [6, 9, 9]
    assert first.steps_at_start == 6  # of the last, which goes on from a checkpoint that was saved after training
    assert first.said == second.said == []
    assert first.logged["lgc/phase"] == (3.0 if scheme == OF_ALL else 1.0)  # compressed, and still warming up
    assert first.logged["lgc/ratio"] > 1
    assert first.logged["lgc/run_ratio"] == pytest.approx(first.summaries[0]["ratio"])
    assert first.metrics["lgc/run_ratio"] == pytest.approx(first.summaries[0]["ratio"])


def be_refused(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    messages = {}
    with watched(rank, world_size):
        for name, options in job().REFUSED.items():
            with pytest.raises((TypeError, ValueError)) as error:
                job().Training(folder, **options).fit(2)
            messages[name] = f"{error.type.__name__}: {error.value}"
    return messages


REFUSED = {
    "strategy": "TypeError: LGCCallback needs DDP, and this trainer has SingleDeviceStrategy",
    "clipping": "give the scheme clip_norm=0.5, which clips each rank's gradient before",
    "averaging": "ValueError: LGCCallback: WeightAveraging averages the weights of every step, which under local steps",
    "two optimizers": "ValueError: LGCCallback needs one optimizer, and configure_optimizers of Gan returns SGD, Adam",
    "argument": "TypeError: got an unexpected keyword argument 'tiemout'",
    "optimizer": "TypeError: multiple values for argument 'optimizer'",
}


def test_what_would_train_wrongly_is_refused_by_name_on_every_rank(ranks: RankFactory, tmp_path: Path) -> None:
    for messages in ranks(2).run(be_refused, tmp_path, limit_s=LIMIT_S):
        assert messages.keys() == REFUSED.keys()
        for name, text in REFUSED.items():
            assert text in messages[name]


def go_on_without_state(rank: int, world_size: int, folder: Path) -> list[str]:
    with watched(rank, world_size) as said:
        job().Training(folder, None).fit(3, save_every=3)
        job().Training(folder, DGC, buffers_every=2).fit(4, ckpt_path=folder / "saved-step=3.ckpt")
    return said


def test_a_checkpoint_of_a_run_without_the_callback_is_said_to_have_no_state(
    ranks: RankFactory, tmp_path: Path
) -> None:
    said, nothing = ranks(2).run(go_on_without_state, tmp_path, limit_s=LIMIT_S)
    assert said == [f"this checkpoint was made without LGCCallback: {lgc.parse_scheme(DGC)} begins anew, at step 0."]
    assert nothing == []


def fail_in_validation(rank: int, world_size: int, folder: Path) -> list[Any]:
    with watched(rank, world_size):
        training = job().Training(folder, LOCAL)
        training.module.fails_at = 6
        with pytest.raises(RuntimeError, match="validation has failed"):
            training.fit(8, validate_every=3)
        own = {name: each.clone() for name, each in training.module.named_parameters()}
        differs = differing(own, {name: training.module.seen[6][name] for name in own})
        training.module.fails_at = None
        after = training.fit(4).callback.wire_summary
    return [differs, after is not None]


def test_after_a_failed_validation_the_model_is_this_ranks_own_and_fit_can_be_called_again(
    ranks: RankFactory, tmp_path: Path
) -> None:
    assert ranks(2).run(fail_in_validation, tmp_path, limit_s=LIMIT_S) == [[[], True]] * 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("launcher", ["ddp", "ddp_spawn", "torchrun"])
def test_it_trains_however_the_ranks_are_started(tmp_path: Path, launcher: str) -> None:
    start = [*TORCHRUN, "--standalone", "--nproc-per-node=2"] if launcher == "torchrun" else [sys.executable]
    strategy = "ddp" if launcher == "torchrun" else launcher
    command = [*start, str(JOB), strategy, str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert "goes on as if never stopped: True" in done.stdout
