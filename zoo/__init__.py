"""Make and keep single models: architectures, frames, training, a registry of checkpoints.

`__init__.pyi` lists the public names. They are resolved on first use, so listing a registry does not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
