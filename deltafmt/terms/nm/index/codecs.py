"""The codec of each index encoding, by the encoding's name."""

from __future__ import annotations

from typing import Final

from deltafmt.terms.nm.index.codec import IndexCodec
from deltafmt.terms.nm.index.fixed import FixedIndex
from deltafmt.terms.nm.index.rank import RankIndex
from deltafmt.terms.nm.index.seeded import SeededIndex

INDEX_CODECS: Final[dict[str, type[IndexCodec]]] = {
    codec.encoding.name: codec for codec in (SeededIndex, FixedIndex, RankIndex)
}
