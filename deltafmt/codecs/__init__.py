"""Lossless codecs: arrays of positions, codes and scales to packed buffers and back."""
