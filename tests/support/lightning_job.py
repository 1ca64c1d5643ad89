"""Training under Lightning: `lightning_job.py STRATEGY FOLDER`, or a part of it on ranks that are there already."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lgc.integrations.lightning import LGCCallback

BATCHES = 40  # of a rank in an epoch


class Module(LightningModule):
    """A model with batch norm; its batches depend on rank and number alone.

    Attributes:
        seen: a copy of this rank's weights and buffers after every step of the optimizer, by its number.
        validated: the same in every validation.
        at_start: the same when training began.
    """

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        self._optimizer = optimizer
        self.clear()
        self.fails_at: int | None = None

    def clear(self) -> None:
        self.seen: dict[int, dict[str, Tensor]] = {}
        self.validated: list[dict[str, Tensor]] = []
        self.at_start: dict[str, Tensor] = {}
        self.steps_at_start = 0

    def everything(self) -> dict[str, Tensor]:
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: each.detach().clone() for name, each in tensors.items()}

    def training_step(self, _: Tensor, batch_idx: int) -> Tensor:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * batch_idx + self.global_rank))
        loss: Tensor = self.body(x).float().square().mean()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return loss * float("inf") if scaler is not None and batch_idx == self.global_rank == 1 else loss

    def validation_loss(self) -> Tensor:
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(7), device=self.device)
        loss: Tensor = (self.body(x) - 1).square().mean()
        return loss

    def validation_step(self, _: Tensor, batch_idx: int) -> None:
        if self.fails_at is not None and self.trainer.global_step >= self.fails_at:
            raise RuntimeError("validation has failed")
        self.validated.append(self.everything())
        self.log("val_loss", self.validation_loss().detach())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self._optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05)
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(BATCHES * self.trainer.world_size))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(self.trainer.world_size))  # type: ignore[arg-type]


class Gan(Module):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.body[0].parameters(), lr=0.1), torch.optim.Adam(self.body[3].parameters())


class Probe(Callback):
    """Looks at the weights after every step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Module)
        pl_module.at_start = pl_module.everything()
        handles = [each.handle for each in getattr(trainer, "callbacks") if isinstance(each, LGCCallback)]  # noqa: B009 - it has no type
        pl_module.steps_at_start = handles[0].step if handles and handles[0] is not None else 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Module)
        pl_module.seen.setdefault(trainer.global_step, pl_module.everything())


class Training:
    """A module and the callback, for one call of `fit` after the other.

    Args:
        folder: of checkpoints and logs.
        scheme: None trains without the callback.
        module: a new one by default.
        of_trainer: arguments of Trainer; `buffers_every`, and what is not of Trainer, is for the callback.
    """

    def __init__(self, folder: Path, scheme: str | None, module: Module | None = None, **of_trainer: Any) -> None:
        own = {name: of_trainer.pop(name) for name in ("buffers_every", "tiemout", "optimizer") if name in of_trainer}
        self.folder = folder
        self.callback = None if scheme is None else LGCCallback(scheme, **own)
        plain = scheme is not None and scheme.startswith("dgc") and "momentum=0" not in scheme
        self.module = module or Module("sgd" if plain else "adamw")
        self._of_trainer = of_trainer

    def fit(
        self,
        steps: int,
        *,
        save_every: int | None = None,
        validate_every: int | None = None,
        monitor: bool = False,
        logs: bool = False,
        **of_fit: Any,
    ) -> Training:
        self.module.clear()
        of_trainer = dict(self._of_trainer)
        callbacks: list[Callback] = [*of_trainer.pop("callbacks", []), Probe()]
        if self.callback is not None:
            callbacks.insert(0, self.callback)
        if save_every:
            callbacks.append(
                ModelCheckpoint(self.folder, "saved-{step}", save_top_k=-1, every_n_train_steps=save_every)
            )
        if monitor:
            self.checkpoint = ModelCheckpoint(self.folder / "best", monitor="val_loss")
            self.weights_only = ModelCheckpoint(
                self.folder / "weights", monitor="step", mode="max", save_weights_only=True, every_n_train_steps=1
            )
            stopping = EarlyStopping("val_loss", patience=1, min_delta=0.05)
            callbacks = [stopping, *callbacks, self.checkpoint, self.weights_only]
        if of_trainer.get("precision") == "16-mixed":  # which Lightning has for GPUs only
            del of_trainer["precision"]
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            of_trainer["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", "2"))
        arguments: dict[str, Any] = {"accelerator": "cpu", "devices": devices, "strategy": "ddp", **of_trainer}
        self.trainer = Trainer(
            **arguments,
            callbacks=callbacks,
            default_root_dir=self.folder,
            logger=CSVLogger(self.folder, "logs", "") if logs else False,
            max_steps=steps,
            limit_val_batches=1 if validate_every else 0,
            val_check_interval=validate_every,
            log_every_n_steps=1,
            enable_checkpointing=bool(save_every or monitor),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.trainer.fit(self.module, **of_fit)
        return self


REFUSED: dict[str, dict[str, Any]] = {
    "strategy": {"scheme": "dgc", "strategy": SingleDeviceStrategy(torch.device("cpu")), "devices": 1},
    "clipping": {"scheme": "dgc", "gradient_clip_val": 0.5},
    "averaging": {"scheme": "local", "callbacks": [WeightAveraging()]},
    "two optimizers": {"scheme": "dgc:momentum=0", "module": Gan()},
    "argument": {"scheme": "dgc", "tiemout": 5},
    "optimizer": {"scheme": "dgc", "optimizer": None},
}


def logged_in(folder: Path) -> dict[str, float]:
    """The last value of everything that was logged."""
    with (folder / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: float(value) for row in rows for name, value in row.items() if value}


def main(strategy: str, folder: Path) -> None:
    """Train, stop amid a round, and go on; what both end with is compared by rank 0."""
    scheme = "local:every=4:start_steps=0+quantized"
    whole = Training(folder, scheme, strategy=strategy).fit(10, save_every=6)
    stopped = Training(folder, scheme, strategy=strategy).fit(10, ckpt_path=folder / "saved-step=6.ckpt")
    pairs = zip(whole.module.parameters(), stopped.module.parameters(), strict=True)
    same = [torch.equal(one, other) for one, other in pairs]
    if whole.trainer.is_global_zero:
        print("ratio", float(stopped.trainer.callback_metrics["lgc/run_ratio"]))
        print("goes on as if never stopped:", all(same))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
