"""Models, data and settings to train with. A recipe is one file; to add one, copy one and list it here."""

import hashlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from lgc_lab.recipes.camvid import CAMVID_PSPNET
from lgc_lab.recipes.cifar10 import CIFAR10_RESNET20, CIFAR10_RESNET50, CIFAR10_RESNET101
from lgc_lab.recipes.data import Data, Split, TensorSplit
from lgc_lab.recipes.digits import DIGITS, DIGITS_MLP
from lgc_lab.recipes.imagenet import IMAGENET_RESNET50
from lgc_lab.recipes.recipe import ACCURACY, Metric, Recipe, poly_decay, step_decay, warmup_and_cosine
from lgc_lab.recipes.text import TEXT_GPT

OWN = [DIGITS, DIGITS_MLP, CIFAR10_RESNET20, CIFAR10_RESNET50, CIFAR10_RESNET101]
OWN += [IMAGENET_RESNET50, CAMVID_PSPNET, TEXT_GPT]
RECIPES = {recipe.name: recipe for recipe in OWN}

__all__ = [
    "ACCURACY",
    "RECIPES",
    "Data",
    "Metric",
    "Recipe",
    "Split",
    "TensorSplit",
    "find_object",
    "find_recipe",
    "poly_decay",
    "source_digest",
    "step_decay",
    "warmup_and_cosine",
]


def find_recipe(name: str) -> Recipe:
    """Find the recipe of this name; `module:NAME` is one of a user's own module. Raises ValueError if there is none."""
    if ":" in name:
        recipe = find_object("recipe", name)
        if not isinstance(recipe, Recipe):
            raise ValueError(f"recipe {name} must be an lgc_lab.recipes.Recipe, got {type(recipe).__name__}.")
        return recipe
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}, and your own as module:NAME.")
    return RECIPES[name]


def find_object(what: str, text: str) -> Any:
    """Import what `module:name` names, from the current folder or what is installed.

    Raises ValueError if there is none; the message calls it `what`.
    """
    module, _, name = text.partition(":")
    if not name or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ValueError(f"{what} must be MODULE:NAME, as in mine:NAME for NAME of mine.py, got {text!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what} {text}: {error}; looked in {os.getcwd()} and among what is installed.") from error


def source_digest(name: str) -> str | None:
    """Digest the file of a user's own recipe, `module:NAME`: SHA-256, 16 digits; None for the project's recipes."""
    if ":" not in name:
        return None
    file = sys.modules[name.partition(":")[0]].__file__
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
