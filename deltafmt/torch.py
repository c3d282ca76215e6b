"""Deltas on a device: ``deltafmt.torch.load(path, device="cuda")``."""
