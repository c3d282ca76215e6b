"""Deltas on a device: ``deltafmt.torch.load(path, device="cuda")``."""

from __future__ import annotations

from deltafmt.runtime.device_delta import DeviceDelta, DeviceTensor
from deltafmt.runtime.pinned import free_buffers
from deltafmt.runtime.upload import load

__all__ = ["DeviceDelta", "DeviceTensor", "free_buffers", "load"]
