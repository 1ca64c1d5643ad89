"""Models, data and settings to train with. A recipe is one file; to add one, copy one and list it here."""

from lgc.recipes.digits import DIGITS
from lgc.recipes.recipe import Data, Metric, Recipe

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (DIGITS,)}

__all__ = ["RECIPES", "Data", "Metric", "Recipe", "find_recipe"]


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: if there is none, with the names that there are.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}.")
    return RECIPES[name]
