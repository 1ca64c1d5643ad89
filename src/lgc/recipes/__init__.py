"""Models, data and settings to train with. A recipe is one file; to add one, copy one and list it here."""

from lgc.recipes.camvid import CAMVID_PSPNET
from lgc.recipes.cifar10 import CIFAR10_RESNET20, CIFAR10_RESNET50, CIFAR10_RESNET101
from lgc.recipes.data import Data, Split
from lgc.recipes.digits import DIGITS, DIGITS_MLP
from lgc.recipes.imagenet import IMAGENET_RESNET50
from lgc.recipes.recipe import Metric, Recipe
from lgc.recipes.text import TEXT_GPT

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        DIGITS,
        DIGITS_MLP,
        CIFAR10_RESNET20,
        CIFAR10_RESNET50,
        CIFAR10_RESNET101,
        IMAGENET_RESNET50,
        CAMVID_PSPNET,
        TEXT_GPT,
    )
}

__all__ = ["RECIPES", "Data", "Metric", "Recipe", "Split", "find_recipe"]


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: if there is none, with the names that there are.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}.")
    return RECIPES[name]
