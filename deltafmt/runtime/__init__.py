"""Deltas on a device: streaming upload, and models that serve them."""
