"""How good are members and rules, how do they differ, and is the gain real?"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
