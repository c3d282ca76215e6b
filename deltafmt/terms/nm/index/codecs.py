"""The codec of each index encoding: ``CODEC`` of the file that has the encoding's name."""

from __future__ import annotations

import importlib
from typing import Final

from deltafmt.terms.nm.index.codec import IndexCodec
from deltafmt.terms.nm.index.encodings import ENCODINGS

INDEX_CODECS: Final[dict[str, type[IndexCodec]]] = {
    name: importlib.import_module(f"{__package__}.{name}").CODEC for name in ENCODINGS
}
