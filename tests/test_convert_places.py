"""Which elements of a tensor change, and checks of their places, against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Raw, safetensors_bytes
from deltafmt.checkpoint import safetensors_file
from deltafmt.checkpoint.safetensors_file import SafetensorsFile
from deltafmt.errors import InvalidFileError
from deltafmt.foreign import places as module
from deltafmt.foreign.places import Places, check_ascending, put
from strategies import same_examples


@same_examples(40)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 90),
    width=st.sampled_from((1, 2, 4, 8)),
    share=st.sampled_from((0, 0.2, 1)),
)
def test_changed_elements(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, width: int, share: float
) -> None:
    """Tensors of several pieces, whose places are used some at a time."""
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 256, count * width, np.uint8)
    new = np.where(rng.random(old.size) < share, old ^ rng.integers(0, 256, old.size, np.uint8), old)
    path = tmp_path_factory.mktemp("places") / "t.safetensors"
    path.write_bytes(safetensors_bytes({"w": Raw("U8", (old.size,), old.tobytes())}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "STEP", 24)
        patch.setattr(safetensors_file, "_SMALL", 24)
        patch.setattr(module, "_STEP", 5)
        file = SafetensorsFile(path)
        found = Places(file.tensors["w"], new, width)
        file.close()
        units = new.view(f"u{width}")
        (places,) = np.nonzero(old.view(units.dtype) != units)
        assert (found.count, found.last) == (places.size, places[-1] if places.size else -1)
        got = [np.empty(0, "<u4"), *found.places(np.dtype("<u4"))]
        assert np.array_equal(np.concatenate(got), places)
        values = np.concatenate([np.empty(0, np.uint8), *found.values()])
        assert np.array_equal(values, units[places].view(np.uint8))
        out = old.view(units.dtype).copy()
        put(out, places, units[places])
        assert np.array_equal(out, units)


@same_examples(60)
@given(positions=st.lists(st.integers(-1, 30), max_size=12), ascending=st.booleans())
def test_places_that_ascend(positions: list[int], ascending: bool) -> None:
    """Faults are found wherever they stand, on the border of two steps too."""
    positions = sorted(set(positions)) if ascending else positions
    right = all(0 <= each < 29 for each in positions) and positions == sorted(set(positions))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STEP", 3)
        if right:
            check_ascending(np.array(positions, "<i4"), 29, "index")
            return
        with pytest.raises(InvalidFileError, match=r"lies outside|they must ascend"):
            check_ascending(np.array(positions, "<i4"), 29, "index")
