"""`Recipe`: everything that steers training, as plain data; the tables of optimisers and schedules."""

from zoo.recipe.optimisers import OPTIMISERS, Choice
from zoo.recipe.schedules import SCHEDULES, Position, schedule_factor
from zoo.recipe.settings import PRECISIONS, Recipe

__all__ = ["OPTIMISERS", "PRECISIONS", "SCHEDULES", "Choice", "Position", "Recipe", "schedule_factor"]
