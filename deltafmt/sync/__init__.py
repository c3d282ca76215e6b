"""Weight sync: processes that follow the parameters of a training run, patch by patch.

Importing this module without torch raises :class:`deltafmt.errors.MissingExtraError`, an ``ImportError``.
``docs/how-to/follow.md`` is the guide.
"""

from __future__ import annotations

from deltafmt.errors import MissingExtraError
from deltafmt.extras import lacking

if _missing := lacking("deltafmt.sync", "torch", extra="torch"):
    raise MissingExtraError(_missing)

from deltafmt.sync.folder import Folder
from deltafmt.sync.message import Message, Reply
from deltafmt.sync.publisher import Publisher
from deltafmt.sync.sparse_patches import SparsePatch, convert_patches, sparse_patches
from deltafmt.sync.stream import read_message, write_message
from deltafmt.sync.subscriber import Subscriber

__all__ = [
    "Folder",
    "Message",
    "Publisher",
    "Reply",
    "SparsePatch",
    "Subscriber",
    "convert_patches",
    "read_message",
    "sparse_patches",
    "write_message",
]
