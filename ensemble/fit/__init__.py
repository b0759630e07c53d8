"""Fit rules on validation frames: weights with a certificate, temperatures, pools with more numbers.

Every fit is made on frames that judge nothing afterwards, and remembers their fingerprint.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
