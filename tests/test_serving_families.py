"""Every family of transformers, served: one delta, a mixed batch and a merge give what the unpacked fine-tunes give."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import deltafmt
from deltafmt.errors import UsageError
from deltafmt.methods import RTN, DeltaDQ
from deltafmt.transformers import attach
from lora_models import FAMILIES, new_family, outputs, same, shake

# A decoder's own embedding, which its model does not use where it has another.
pytestmark = pytest.mark.filterwarnings("ignore:the model has not called:RuntimeWarning")

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "how-to" / "serve.md"
# Families whose parts are read in a way of their own get two deltas with terms of different kinds.
TWICE: Final = (
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "phimoe",
    "mamba2",
    "jamba",
    "siglip",
    "llama",
    "deberta",
    "llama4",
)

# Families that refuse a mixed batch: what the documentation says, and what the message says.
ONE_AT_A_TIME: Final = {
    "siglip": ("a query that is the same for all rows", "is given the shape"),
    "swin": ("windows as rows", "is given the shape"),
}


def made(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return a base with two deltas attached, and the outputs of the base and of the unpacked fine-tunes."""
    model = new_family(name).eval()
    model.save_pretrained(folder / "base")
    kind = type(model)
    deltas, expected = {}, {}
    methods = {"one": DeltaDQ(4, 8, 4), "two": RTN(6)} if name in TWICE else {"one": DeltaDQ(4, 8, 4)}
    for number, (delta, method) in enumerate(methods.items()):
        tuned = new_family(name)
        shake(tuned, 7 + number, 0.05)
        for buffer_name, buffer in tuned.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.add_(0.05 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(number)))
        tuned.save_pretrained(folder / delta)
        deltas[delta] = folder / f"{delta}.deltafmt"
        deltafmt.pack(folder / "base", folder / delta, deltas[delta], method=method)
        deltafmt.unpack(folder / "base", deltas[delta], folder / f"{delta}-out")
        expected[delta] = outputs(kind.from_pretrained(folder / f"{delta}-out").eval(), name)
    base = kind.from_pretrained(folder / "base").eval()
    expected["base"] = outputs(base, name)
    return attach(base, deltas), expected


def mixed(expected: dict[str, Any], rows: Sequence[str | None]) -> Any:
    """Return the outputs of a batch whose rows are of several models."""
    return torch.stack([expected[row or "base"][number] for number, row in enumerate(rows)])


@pytest.mark.sampled
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_is_served(tmp_path: Path, name: str) -> None:
    model, expected = made(name, tmp_path)
    assert not same(expected["one"], expected["base"])
    last = model.deltas.names[-1]
    with model.delta("one"):
        assert same(outputs(model, name), expected["one"])
    for rows in (("one", None), ("two" if name in TWICE else None, "one")):
        with model.delta(list(rows)):
            if name in ONE_AT_A_TIME:
                with pytest.raises(UsageError, match=ONE_AT_A_TIME[name][1]):
                    outputs(model, name)
            else:
                assert same(outputs(model, name), mixed(expected, rows))
    assert torch.equal(outputs(model, name), expected["base"])
    model.deltas.merge(last)
    assert same(outputs(model, name), expected[last])
    model.deltas.unmerge()
    assert torch.equal(outputs(model, name), expected["base"])


def table() -> str:
    """Return the table of architectures as the documentation has it."""
    reasons: dict[str, list[str]] = {}
    for name in FAMILIES:
        reasons.setdefault(ONE_AT_A_TIME[name][0] if name in ONE_AT_A_TIME else "", []).append(name)
    lines = ["| family | one delta | a mixed batch | merged |", "|---|---|---|---|"]
    for reason, names in reasons.items():
        shown = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {shown} | served | {'refused: ' + reason if reason else 'served'} | yes |")
    return "\n".join(lines)


def test_the_documentation_has_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    blocks = ["\n".join(lines) for _, lines in itertools.groupby(page.splitlines(), lambda line: line[:1] == "|")]
    assert table() in blocks
