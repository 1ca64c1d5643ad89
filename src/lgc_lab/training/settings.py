"""Settings of a run, and what it is to leave."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from lgc import Scheme, __version__, parse_scheme
from lgc.schemes import require_rounds_by_count
from lgc_lab.recipes import Data, Recipe, find_recipe, source_digest

MOST_SEED = 2**63 - 1  # torch.manual_seed
OF_RECIPE = ("epochs", "batch_size", "learning_rate")  # its own where they are not set


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Decides a run's result; plain values, so that they can be compared and passed on. None is the recipe's own."""

    recipe: str
    scheme: str  # text form; arguments it does not set come from the recipe
    world_size: int  # number of ranks, at least 1 like every count here
    seed: int = 0  # of the model, the shuffling and the augmentation, in 0 .. 2^63 - 1
    epochs: int | None = None
    steps: int | None = None  # to stop after; None is at the end of the epochs
    batch_size: int | None = None  # per rank
    learning_rate: float | None = None  # before the schedule's factor, above 0
    data: str | None = None  # folder or name of the data set
    limit_train: int | None = None  # use so many samples only; None is all
    limit_test: int | None = None  # the same, at least one a rank
    backbone: str | None = None  # None is the recipe's first
    bf16: bool = False  # the model computes in bfloat16 where autocast has it do so
    compile: bool = False  # the model is compiled for training, by torch.compile
    source: str | None = field(init=False, default=None)  # digest of the file of a user's own recipe, at this time

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
        require_rounds_by_count(self.resolve_scheme(), "the training of a recipe")
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
    """Says what a run leaves; nothing here changes its result."""

    folder: Path  # one for all ranks
    checkpoint_every: int | None = None  # steps; None is an epoch, 0 is never
    tensorboard: bool = False  # whether to write TensorBoard events
