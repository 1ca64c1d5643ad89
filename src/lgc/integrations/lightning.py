"""Lightning: a scheme for `trainer.fit` under the strategy DDP, with its state in the trainer's checkpoints."""

from __future__ import annotations

import copy
import inspect
import logging
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

import lgc
from lgc import Handle, LocalSteps, Phase, Scheme
from lgc.integrations.own_state import Attached
from lgc.schemes import as_scheme, require_rounds_by_count

logger = logging.getLogger("lgc")

KEY = "lgc"  # of the ranks' states in a checkpoint, and of what is logged
SUMMARY = ("sent_bytes", "received_bytes", "ratio", "ratio_compressed_phase")


class LGCCallback(Callback):
    """Exchanges by a scheme what `trainer.fit` learns, and has every rank's state in the trainer's checkpoints.

        trainer = Trainer(strategy="ddp", callbacks=[LGCCallback("dgc:rate=0.01")])

    The scheme is attached when training starts and detached when it ends. Every checkpoint has the state of each rank,
    and `trainer.fit(ckpt_path=...)` goes on from it, on another number of ranks with states that are resharded. Under
    local steps all ranks validate, choose and save the weights that they share, and training ends with a round.

    Args:
        scheme: as for `lgc.attach`.
        attach_arguments: the others of `lgc.attach`. Optimizer and GradScaler are the trainer's. `timeout` is None
            here: that of the strategy's process group.

    Attributes:
        handle: what is attached, while `fit` trains; else None.
        wire_summary: of the last `fit` that has ended, as `Handle.wire_summary`; None before. In a process that has
            started the ranks (`ddp_spawn`) it stays None, and its numbers are in `trainer.callback_metrics`.
    """

    def __init__(self, scheme: Scheme | str, **attach_arguments: Any) -> None:
        self.scheme = as_scheme(scheme)
        require_rounds_by_count(self.scheme, "a Trainer")
        self.handle: Handle | None = None
        self.wire_summary: dict[str, object] | None = None
        self._arguments = {"timeout": None, **attach_arguments}
        inspect.signature(lgc.attach).bind(None, scheme, None, grad_scaler=None, **self._arguments)
        self._attached: Attached | None = None
        self._last: dict[str, Any] | None = None  # state of this rank when training ended
        self._loaded: list[Tensor] | None = None  # states of all ranks, until something is attached
        self._anchored = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer that cannot train with the scheme, before anything else is done.

        Raises:
            TypeError: its strategy is not DDP.
            ValueError: it clips gradients after a scheme whose momentum acts before, or has a callback that averages
                this rank's own weights.
        """
        if stage != TrainerFn.FITTING:
            return
        require_ddp(trainer)
        require_no_clipping(trainer, self.scheme)
        require_no_averaging(trainer, self.scheme)
        if self.handle is not None:  # of a fit that has failed
            self.handle.detach()
        self.handle = self._attached = self._last = self._loaded = self.wire_summary = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ValueError if there is not one optimizer."""
        names = ", ".join(type(each).__name__ for each in trainer.optimizers) or "none"
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"LGCCallback needs one optimizer, and configure_optimizers of {type(pl_module).__name__} returns "
                f"{names}: in one DistributedDataParallel model, as Lightning makes it, what one of them steps with "
                "would enter what the other is owed. Give one optimizer parameter groups; train a GAN in a loop of its "
                "own, with a DistributedDataParallel model and a handle for each network."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the scheme, and go on from the checkpoint that was loaded, if any; a collective."""
        (optimizer,) = trainer.optimizers
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        assert trainer.strategy.model is not None
        self.handle = lgc.attach(trainer.strategy.model, self.scheme, optimizer, grad_scaler=scaler, **self._arguments)
        self._attached = Attached(self.handle, optimizer, scaler)
        if self._loaded is not None:
            state = lgc.checkpoint.load_gathered(self._loaded, group=self.handle.transport.group)
            self._attached.load_state_dict(state)
            self._loaded = None
        if isinstance(self.scheme, LocalSteps):
            # Not in `on_save_checkpoint`, which is not called for checkpoints of weights alone.
            take = partial(type(trainer.strategy).lightning_module_state_dict, trainer.strategy)
            shared = partial(_shared_state_dict, self.handle, take)
            trainer.strategy.lightning_module_state_dict = shared  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the phase (0 dense to 3 compressed), the ratio of this rank so far, and the scheme's metrics."""
        assert self.handle is not None
        phase, ratio = list(Phase).index(self.handle.phase), self.handle.wire_summary(of_all=False)["ratio"]
        values = _numbers({"phase": phase, "ratio": ratio, **self.handle.metrics})
        pl_module.log_dict({f"{KEY}/{name}": value for name, value in values.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a last round under local steps, keep the state for checkpoints to come, and detach; a collective."""
        assert self.handle is not None
        assert self._attached is not None
        self.handle.finish()
        self._last = move_data_to_device(self._attached.state_dict(), torch.device("cpu"))
        if isinstance(self.scheme, LocalSteps):
            trainer.strategy.__dict__.pop("lightning_module_state_dict")
            # `fit` makes optimizers anew: the moments of this one need not be exchanged.
            without_moments = copy.copy(trainer.optimizers[0])
            without_moments.state = defaultdict(dict)
            self.handle.use_optimizer(without_moments)
        self.handle.detach()
        self.wire_summary = self.handle.wire_summary()
        self.handle = self._attached = None
        numbers = _numbers({f"{KEY}/run_{name}": self.wire_summary[name] for name in SUMMARY})
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in numbers.items()})
        for each in trainer.loggers:
            each.log_metrics(numbers, step=trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate what all ranks share."""
        if self.handle is not None:
            self._anchored.enter_context(self.handle.anchored())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with this rank's own."""
        self._anchored.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave validation, if it has failed."""
        self._anchored.close()

    def state_dict(self) -> dict[str, Any]:
        """What makes Lightning warn when it loads a checkpoint into a trainer without this callback."""
        return {"scheme": str(self.scheme)}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state of every rank, as tensors of bytes; a collective."""
        own = self._last if self._attached is None else self._attached.state_dict()
        states = self._loaded
        if own is not None:
            assert dist.group.WORLD is not None
            states = lgc.checkpoint.gather(own, group=dist.group.WORLD)
        if states is not None:
            checkpoint[KEY] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states of all ranks until the scheme is attached."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._loaded = checkpoint.get(KEY)
        if self._loaded is None and checkpoint["global_step"] and trainer.is_global_zero:
            logger.warning("this checkpoint was made without LGCCallback: %s begins anew, at step 0.", self.scheme)


def require_ddp(trainer: Trainer) -> None:
    """Raise TypeError if the trainer's strategy is not DDP."""
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise TypeError(
            f"LGCCallback needs DDP, and this trainer has {type(strategy).__name__}; use Trainer(strategy='ddp'), also "
            "with a single device. Under sharded strategies a rank does not have the whole gradient."
        )


def require_no_clipping(trainer: Trainer, scheme: Scheme) -> None:
    """Raise ValueError if the trainer clips gradients after a scheme whose momentum acts before."""
    if trainer.gradient_clip_val and (scheme.corrected_momentum or scheme.makes_adams_step):
        raise ValueError(
            f"LGCCallback: Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips what a round gives, and the "
            f"momentum of {scheme} acts before the round: it harms training. Leave it out, and give the scheme "
            f"clip_norm={trainer.gradient_clip_val}, which clips each rank's gradient before."
        )


def require_no_averaging(trainer: Trainer, scheme: Scheme) -> None:
    """Raise ValueError if a callback of Lightning's averages weights that are this rank's own between rounds."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    averaging = [each for each in callbacks if isinstance(each, StochasticWeightAveraging | WeightAveraging)]
    if averaging and isinstance(scheme, LocalSteps):
        raise ValueError(
            f"LGCCallback: {type(averaging[0]).__name__} averages the weights of every step, which under local steps "
            "are each rank's own: every rank would end with an average of its own. Leave it out, and update an "
            "AveragedModel within `with callback.handle.anchored():` in a callback of your own, once a round."
        )


def _numbers(values: dict[str, object]) -> dict[str, float]:
    """Those that are there: a run may have no compressed phase, and one rank sends nothing."""
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _shared_state_dict(handle: Handle, take: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A copy of the module's state with the weights and buffers that all ranks share."""
    with handle.anchored():
        return copy.deepcopy(take())
