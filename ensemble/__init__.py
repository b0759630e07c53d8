"""Run many models as one, combine what they predict, and judge whether the combination is better.

`__init__.pyi` lists the public names. They are resolved on first use, so `ensemble --help` does not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
