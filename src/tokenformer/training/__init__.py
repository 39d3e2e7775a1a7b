"""Training from a recipe, on transformers' Trainer."""

from tokenformer.training.image_recipe import ImageRecipe
from tokenformer.training.recipe import Recipe
from tokenformer.training.run import train

__all__ = ["ImageRecipe", "Recipe", "train"]
