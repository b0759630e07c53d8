"""Members: models from a registry or from your own code, as a set that runs as one over frames.

roster      `Members`, in groups of equal models
loading     where members come from
collecting  what they say, in memory or in a store
"""

from ensemble.members.collecting import collect, predictions
from ensemble.members.loading import from_modules, load, versions
from ensemble.members.roster import Member, Members

__all__ = ["Member", "Members", "collect", "from_modules", "load", "predictions", "versions"]
