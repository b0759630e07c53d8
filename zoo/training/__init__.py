"""Training: the recipe, the loop for one model or for many of one spec at once, and averages of checkpoints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
