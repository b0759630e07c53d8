"""Members: models from a registry or from your own code, as a set that runs as one over frames."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
