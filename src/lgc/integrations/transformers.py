"""Transformers: a callback with which a Trainer exchanges by a scheme, and saves and resumes every rank's state."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import lgc
from lgc import Handle, LocalSteps, PowerSGD, Scheme
from lgc.integrations import own_state
from lgc.integrations.accelerate import inner_optimizer, require_ddp
from lgc.integrations.own_state import Attached
from lgc.requirements import uncompiled
from lgc.schemes import as_scheme, require_rounds_by_count

logger = logging.getLogger("lgc")


class LGCCallback(TrainerCallback):  # type: ignore[misc]  # a framework without types here
    """Exchanges by `scheme` what a Trainer learns, in every `train()`.

        trainer.add_callback(LGCCallback(trainer, "local:every=20+quantized"))

    What each rank has of its own is saved in the folder `lgc` of every checkpoint, and found by
    `resume_from_checkpoint`. Under local steps evaluation, prediction and every saved model are those of what all ranks
    share, and training ends with a round. The ratios and bytes of all ranks are the last that is logged.

    Args:
        trainer: that the callback is added to. Under local steps and PowerSGD its DDP does not look for unused
            parameters, which would communicate at every step, unless `ddp_find_unused_parameters` was set.
        scheme: as for `lgc.attach`.
        attach_arguments: the others of `lgc.attach`. `timeout` is None here: that of `ddp_timeout`.

    Attributes:
        handle: of this `train()`, or the last one, after which it is detached; None before the first.

    `train()` raises, on every rank, ValueError if the callback has not been added, if the Trainer is not distributed,
    not by DistributedDataParallel, or set to what the scheme cannot do, and what `lgc.attach` raises.
    """

    def __init__(self, trainer: Trainer, scheme: Scheme | str, **attach_arguments: Any) -> None:
        self.handle: Handle | None = None
        self._attached: Attached | None = None
        self._trainer = trainer
        self._scheme = as_scheme(scheme)
        require_rounds_by_count(self._scheme, "a Trainer")
        self._arguments = {"timeout": None, **attach_arguments}
        self._resumed: Path | None = None
        self._has_finished = False
        if isinstance(self._scheme, LocalSteps | PowerSGD) and trainer.args.ddp_find_unused_parameters is None:
            trainer.args.ddp_find_unused_parameters = False
            trainer.accelerator.ddp_handler.find_unused_parameters = False
        self._train = trainer.train
        self._save_model = trainer.save_model
        self._load_best_model = trainer._load_best_model
        trainer.train = self.train
        trainer.save_model = self.save_model
        trainer._load_best_model = self.load_best_model
        trainer.evaluate = self._with_anchor(trainer.evaluate)
        trainer.predict = self._with_anchor(trainer.predict)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Attach, and go on from this rank's state if a checkpoint was loaded; a collective."""
        trainer = self._trainer
        require_ddp(trainer.accelerator, trainer.model_wrapped)
        self._require_arguments(args)
        optimizer, scaler = inner_optimizer(trainer.optimizer), trainer.accelerator.scaler
        model = trainer.model_wrapped
        self.handle = lgc.attach(model, self._scheme, optimizer, grad_scaler=scaler, **self._arguments)
        self._attached = Attached(self.handle, optimizer, scaler)
        self._has_finished = False
        if self._resumed is not None:
            self._load(self._resumed)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Finish before the last checkpoint, and where an evaluation has ended training."""
        if control.should_training_stop:
            self._finish()

    on_epoch_end = on_step_end

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the model to whoever trains it next; a collective."""
        self._finish()
        self._detach()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train."""
        if self not in self._trainer.callback_handler.callbacks:
            raise ValueError(
                f"LGCCallback was made for this {type(self._trainer).__name__} and not added to it, so that nothing "
                "would be attached: trainer.add_callback(callback)."
            )
        if self.handle is not None and not self.handle.is_detached:  # the last training was broken off
            self._detach()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self._trainer.args.output_dir) or True
        self._resumed = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        return self._train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer.save_model, which is also where a checkpoint begins; what ends it has removed older ones."""
        self._with_anchor(self._save_model)(output_dir, _internal_call=_internal_call)
        if _internal_call and output_dir is not None and not self._trainer.args.save_only_model and self._attached:
            step, group = self._trainer.state.global_step, self._attached.handle.transport.group
            state = self._attached.state_dict([self._trainer.lr_scheduler])
            own_state.save(Path(output_dir) / own_state.FOLDER, state, step=step, group=group)

    def load_best_model(self) -> None:
        """As Trainer._load_best_model, of which a round afterwards would make something else."""
        self._finish()
        self._load_best_model()

    def _require_arguments(self, args: TrainingArguments) -> None:
        scheme = self._scheme
        if args.max_grad_norm and (scheme.corrected_momentum or scheme.makes_adams_step):
            raise ValueError(
                f"TrainingArguments(max_grad_norm={args.max_grad_norm}) clips the mean after the round, while "
                f"{type(scheme).__name__} has the momentum before it: training would be destroyed. Set "
                "max_grad_norm=0; clip_norm of the scheme clips each rank's gradient before the round."
            )
        model = self._trainer.model_wrapped
        if isinstance(scheme, LocalSteps) and uncompiled(model).find_unused_parameters:
            raise ValueError(
                "TrainingArguments(ddp_find_unused_parameters=True) makes DDP communicate at every step, which local "
                "steps do not; leave it out, and freeze what is not used, by requires_grad_(False)."
            )

    def _load(self, path: Path) -> None:
        assert self._attached is not None
        folder = path / own_state.FOLDER
        if folder.is_dir():
            group = self._attached.handle.transport.group
            state = own_state.load(folder, group=group, without="remove this folder")
            self._attached.load_state_dict(state, [self._trainer.lr_scheduler])
        elif self._trainer.is_world_process_zero():
            logger.warning("%s was made without lgc, whose scheme begins at its step 0 here.", path)

    def _finish(self) -> None:
        if self._has_finished or self.handle is None:
            return
        self._has_finished = True
        self.handle.finish()
        summary = self.handle.wire_summary()
        logged = {f"lgc_{name}": each for name, each in summary.items() if isinstance(each, int | float)}
        control = self._trainer.control
        should_log = control.should_log
        self._trainer.log(logged)
        control.should_log = should_log  # what this step has to say as well

    def _detach(self) -> None:
        assert self.handle is not None
        assert self._attached is not None
        try:
            self.handle.detach()
        except ValueError as error:  # moments without a mean, which only another training would need
            if self._trainer.is_world_process_zero():
                logger.warning("%s Its state is dropped: another train() begins without.", error)
            self._attached.optimizer.state.clear()
            self.handle.detach()
        self._attached = None

    def _with_anchor(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def anchored(*args: Any, **kwargs: Any) -> Any:
            if self.handle is None:
                return method(*args, **kwargs)
            with self.handle.anchored():
                return method(*args, **kwargs)

        return anchored
