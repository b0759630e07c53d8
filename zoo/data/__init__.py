"""Frames of speech, their features, labels and recordings: from audio files, corpora and the bundled sample."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
