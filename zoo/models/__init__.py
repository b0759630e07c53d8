"""Architectures: plain functions from sizes to a module, and `Spec`, which names one with all its options."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
