"""`Recipe`: everything that steers training, as plain data; the tables of optimisers and schedules."""

from zoo.recipe.optimisers import OPTIMISERS, make_optimiser
from zoo.recipe.schedules import SCHEDULES, Position, schedule_factor
from zoo.recipe.settings import PRECISIONS, Recipe

__all__ = ["OPTIMISERS", "PRECISIONS", "SCHEDULES", "Position", "Recipe", "make_optimiser", "schedule_factor"]
