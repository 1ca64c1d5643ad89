"""Settings of a run, and what it is to leave."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from lgc import Scheme, __version__, parse_scheme
from lgc_lab.recipes import Data, Recipe, find_recipe, source_digest

MOST_SEED = 2**63 - 1  # torch.manual_seed
OF_RECIPE = ("epochs", "batch_size", "learning_rate")  # its own where they are not set


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Decides a run's result; plain values, so that they can be compared and passed on.

    Args:
        recipe: name of a recipe.
        scheme: text form of a scheme; arguments it does not set come from the recipe.
        world_size: number of ranks, at least 1.
        seed: of the model, the shuffling and the augmentation, in 0 .. 2^63 - 1.
        epochs, batch_size (per rank): at least 1; None is the recipe's.
        steps: stop after this many, at least 1; None is at the end of the epochs.
        learning_rate: before the schedule's factor, above 0; None is the recipe's.
        data: folder or name of the data set; None is the recipe's own.
        limit_train, limit_test: use this many samples only, at least 1, and one a rank for the test; None is all.
        backbone: one of the recipe's; None is its first.
        bf16: whether the model computes in bfloat16 where autocast has it do so.
        compile: whether the model is compiled for training, by torch.compile.

    Attributes:
        source: digest of the file that has a user's own recipe, as it was when these settings were made.
    """

    recipe: str
    scheme: str
    world_size: int
    seed: int = 0
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    data: str | None = None
    limit_train: int | None = None
    limit_test: int | None = None
    backbone: str | None = None
    bf16: bool = False
    compile: bool = False
    source: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        recipe = find_recipe(self.recipe)
        least = dict.fromkeys(("world_size", "epochs", "steps", "limit_train"), 1) | {"seed": 0}
        least |= {"batch_size": recipe.least_batch_size, "limit_test": self.world_size}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{self.recipe}: {name} must be at least {bound}, got {value}.")
        if self.seed > MOST_SEED:
            raise ValueError(f"seed must be at most {MOST_SEED}, got {self.seed}.")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}.")
        if self.backbone is not None and self.backbone not in recipe.backbones:
            options = ", ".join(recipe.backbones) or "unset for this recipe"
            raise ValueError(f"{self.recipe}: backbone must be {options}, got {self.backbone!r}.")
        self.resolve_scheme()
        object.__setattr__(self, "source", source_digest(self.recipe))

    def resolve_recipe(self) -> Recipe:
        """Find the recipe, with these settings in place of its own."""
        recipe = find_recipe(self.recipe)
        own: dict[str, Any] = {name: getattr(self, name) or getattr(recipe, name) for name in OF_RECIPE}
        if recipe.backbones:
            own["model"] = partial(recipe.model, self.backbone or recipe.backbones[0])
        return replace(recipe, **own)

    def resolve_scheme(self) -> Scheme:
        """Read the scheme, with the recipe's arguments where none are set."""
        return parse_scheme(self.scheme, find_recipe(self.recipe).scheme_defaults)

    def load_data(self) -> Data:
        """Load the data set. The first call decodes it into the cache; let one process do that before the ranks start.

        Raises:
            ValueError, OSError: if it is missing or malformed, or too small for the batches.
        """
        data = self.resolve_recipe().data(self.data, self.limit_train)
        self.steps_per_epoch(data)
        if len(data.test) < self.world_size:
            raise ValueError(
                f"{self.recipe}: the test data must have at least {self.world_size} samples, one a rank, got "
                f"{len(data.test)}."
            )
        return data

    def steps_per_epoch(self, data: Data) -> int:
        """Count the whole batches that every rank has of the training data. Raises ValueError if that is none."""
        samples, batch_size = len(data.train), self.resolve_recipe().batch_size
        steps = samples // (batch_size * self.world_size)
        if steps == 0:
            raise ValueError(
                f"batch_size must be at most {samples // self.world_size} for {samples} samples on {self.world_size} "
                f"ranks, got {batch_size}."
            )
        return steps

    def configuration(self) -> dict[str, Any]:
        """Collect what must be equal for two runs to be the same run, as JSON values."""
        recipe = self.resolve_recipe()
        resolved: dict[str, Any] = {name: getattr(recipe, name) for name in OF_RECIPE}
        resolved["memory_format"] = str(recipe.memory_format).removeprefix("torch.")
        resolved["backbone"] = self.backbone or next(iter(recipe.backbones), None)
        if self.data and "://" not in self.data:
            resolved["data"] = str(PurePath(self.data))  # without a slash at its end
        settings = {name: value for name, value in asdict(self).items() if name != "source" or value is not None}
        return settings | resolved | {"scheme": str(self.resolve_scheme()), "version": __version__}


@dataclass(frozen=True, kw_only=True)
class Output:
    """Says what a run leaves; nothing here changes its result.

    Attributes:
        folder: of the run, one for all ranks.
        checkpoint_every: steps from one checkpoint to the next; None is an epoch, 0 is never.
        tensorboard: whether to write TensorBoard events.
    """

    folder: Path
    checkpoint_every: int | None = None
    tensorboard: bool = False
