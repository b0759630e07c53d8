"""Which members to combine: under a budget, greedily, and what each of them contributes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
