"""Deltas on a device: ``deltafmt.torch.load(path, device="cuda")``.

Importing this module without torch raises :class:`deltafmt.errors.MissingExtraError`, an ``ImportError``.
"""

from __future__ import annotations

from deltafmt.errors import MissingExtraError
from deltafmt.extras import lacking

if _missing := lacking("deltafmt.torch", "torch", extra="torch"):
    raise MissingExtraError(_missing)

from deltafmt.runtime.device_delta import DeviceDelta, DeviceTensor
from deltafmt.runtime.pinned import free_buffers
from deltafmt.runtime.upload import load
from deltafmt.runtime.warmup import Warmed, warmup

__all__ = ["DeviceDelta", "DeviceTensor", "Warmed", "free_buffers", "load", "warmup"]
