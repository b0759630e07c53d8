"""How members that compute alike run fast: groups, forms, and the plan that takes one by measuring.

batch      the inputs of a step, as windows or as the rows they overlap in
dense      models of Linear layers, traced and folded
prepacked  their layers laid out by oneDNN
overlap    their first layer over neighbouring frames, in the frequency domain
forms      running a group in one form, piece by piece
plan       which forms there are, which agree with the loop, which to take: pure
measuring  the clock, and the cache of what it said
group      a group of members with its plans
"""

from ensemble.run._engine.batch import Batch
from ensemble.run._engine.group import Group
from ensemble.run._engine.plan import Form, Plan

__all__ = ["Batch", "Form", "Group", "Plan"]
