"""Deltas on a device: the streaming upload of files, and models that serve deltas."""
