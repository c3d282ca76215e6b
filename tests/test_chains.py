"""Chains: each delta on what the one before it gives; applied at once, one after the other, and as one (spec, 18)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

import deltafmt
from conftest import Cli, Raw, Tensors, normal, nudge, read_folder, refused, write_folder
from deltafmt.errors import InvalidFileError, UsageError, WrongBaseError
from deltafmt.format.constants import DTYPE_BITS, FEATURE_EXACT, FEATURE_PARENT, byte_count
from deltafmt.methods import RTN, Exact, Method
from deltafmt.terms.floats import RAW_DTYPES
from strategies import generators, same_examples

ANCHOR = "anchor.weight"


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def any_raw(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Raw:
    return Raw(dtype, shape, rng.integers(0, 256, byte_count(dtype, shape), np.uint8).tobytes())


def version(rng: np.random.Generator, before: Tensors) -> Tensors:
    """Return the next version of some tensors: some stay, some change in all ways that a fine-tune can."""
    after: Tensors = {ANCHOR: nudge(before[ANCHOR], int(rng.integers(1 << 30)), scale=0.001)}
    for name, tensor in before.items():
        way = rng.integers(8)
        if name == ANCHOR or (way == 0 and len(before) > 2):
            continue
        data = np.frombuffer(tensor.data, np.uint8).copy()
        if way in (1, 2, 3):
            data[rng.random(data.size) < (0.02, 0.3, 1)[way - 1]] += 1
            after[name] = Raw(tensor.dtype, tensor.shape, data.tobytes())
        elif way == 4 and len(tensor.shape) == 2:
            rows = int(rng.integers(1, tensor.shape[0] + 4))
            kept = tensor.data[: byte_count(tensor.dtype, (rows, tensor.shape[1]))]
            size = byte_count(tensor.dtype, (rows, tensor.shape[1]))
            after[name] = Raw(tensor.dtype, (rows, tensor.shape[1]), kept + bytes(size - len(kept)))
        elif way == 5:
            after[name] = any_raw(rng, str(rng.choice(sorted(RAW_DTYPES))), tensor.shape)
        else:
            after[name] = tensor
    if rng.integers(2):
        dtype = str(rng.choice(sorted(DTYPE_BITS)))
        after[f"new.{rng.integers(100)}.{dtype}"] = any_raw(rng, dtype, (int(rng.integers(1, 9)), 8))
    if rng.integers(3) == 0:
        after["tied.weight"] = after.get("layer.0.weight", after[ANCHOR])
    return after


def first_version(rng: np.random.Generator) -> Tensors:
    tensors: Tensors = {ANCHOR: normal(int(rng.integers(1 << 30)), (96, 80))}
    for number in range(int(rng.integers(1, 5))):
        dtype = str(rng.choice(["BF16", "F16", "F32", *sorted(DTYPE_BITS)]))
        shape = [(24, 40), (16,), (3, 4, 8)][rng.integers(3)]
        tensors[f"layer.{number}.weight"] = any_raw(rng, dtype, shape)
    return tensors


class Links:
    """A chain in a folder: ``d1.deltafmt`` and so on, and ``v0`` to ``vN``, what they give one after the other."""

    def __init__(self, folder: Path, base: Tensors, files: dict[str, bytes] | None = None) -> None:
        self.folder = folder
        self.states = [write_folder(folder / "v0", base, None, files)]
        self.deltas: list[Path] = []

    def add(self, tensors: Tensors, method: Method | None = None, **options: Any) -> Path:
        """Pack the next version, and apply it alone."""
        number = len(self.deltas) + 1
        shards = [list(tensors)] if number % 2 else [list(tensors)[::2], list(tensors)[1::2]]
        files = {"config.json": b'{"number": %d}' % number}
        finetuned = write_folder(self.folder / f"ft{number}", tensors, [each for each in shards if each], files)
        out = self.folder / f"d{number}.deltafmt"
        parent = self.deltas[-1] if self.deltas else None
        deltafmt.pack(self.states[-1], finetuned, out, method=method or Exact(), parent=parent, threads=1, **options)
        self.deltas.append(out)
        state = self.folder / f"v{number}"
        deltafmt.apply(self.states[-1], [out], state, threads=1)
        self.states.append(state)
        return out


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Links:
    """Give three exact links, of which each changes two matrices and one more alone."""
    base: Tensors = {f"layers.{number}.weight": normal(number, (32, 48)) for number in range(4)}
    links = Links(tmp_path_factory.mktemp("chain"), base, {"config.json": b"{}"})
    tensors = dict(base)
    for number in range(3):
        for name in ("layers.0.weight", f"layers.{number + 1}.weight"):
            tensors[name] = nudge(tensors[name], 10 * number, scale=0.01)
        links.add(tensors)
    return links


@same_examples(25)
@given(rng=generators(), count=st.integers(2, 4), lossy=st.booleans())
def test_any_chain_gives_what_its_links_give_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory, rng: np.random.Generator, count: int, lossy: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    tensors = first_version(rng)
    links = Links(folder, tensors)
    for _ in range(count):
        tensors = version(rng, read_folder(links.states[-1]))
        method = RTN(4) if lossy and rng.integers(2) else Exact()
        rules: list[tuple[str, Method | None]] = [("*", None), (ANCHOR, method)]
        links.add(
            tensors, method, **({"rules": rules} if not method.exact else {}), missing="removed", quantized="exact"
        )
        if method.exact:
            assert read_folder(links.states[-1]) == tensors
    base, last = links.states[0], links.states[-1]
    threads = int(rng.integers(1, 4))
    result = deltafmt.apply(base, links.deltas, folder / "all", threads=threads)
    assert folder_bytes(folder / "all") == folder_bytes(last)
    assert result.applied == list(map(str, links.deltas))
    half = int(rng.integers(1, count))
    deltafmt.apply(links.states[half], links.deltas[half:], folder / "rest", threads=threads)
    assert folder_bytes(folder / "rest") == folder_bytes(last)
    assert deltafmt.verify(links.deltas[-1], base, before=links.deltas[:-1]).base_tensors is not None
    try:
        deltafmt.squash(links.deltas, folder / "one.deltafmt", base=base, threads=threads)
    except UsageError as error:
        assert lossy
        assert "no sum of terms gives both" in str(error)  # noqa: PT017
        return
    deltafmt.verify(folder / "one.deltafmt", base)
    deltafmt.unpack(base, folder / "one.deltafmt", folder / "one")
    assert read_folder(folder / "one") == read_folder(last)
    restored = deltafmt.open(links.deltas[-1]).container.files
    assert all((folder / "one" / name).read_bytes() == (last / name).read_bytes() for name in restored)
    assert (folder / "one" / "config.json").read_bytes() == (last / "config.json").read_bytes()


def test_a_link_names_its_parent_and_keeps_it(chain: Links, tmp_path: Path, cli: Cli) -> None:
    first, second, _ = chain.deltas
    with deltafmt.open(first) as one, deltafmt.open(second) as two:
        assert (one.container.parent, two.container.parent) == (None, one.container.content_id)
        assert two.container.features == FEATURE_EXACT | FEATURE_PARENT
        parent = one.content_id
    assert f"parent: {parent}, whose result is the base" in cli("inspect", second).out
    assert json.loads(cli("inspect", second, "--json").out)["parent"] == parent
    assert "parent" not in json.loads(cli("inspect", first, "--json").out)
    cold = tmp_path / "cold.deltafmt"
    deltafmt.repack(second, cold, profile="cold")
    deltafmt.apply(chain.states[0], [first, cold], tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(chain.states[2])


def test_the_same_link_without_its_parent_has_another_content_id(chain: Links, tmp_path: Path) -> None:
    alone = tmp_path / "alone.deltafmt"
    deltafmt.pack(chain.states[1], chain.folder / "ft2", alone, method=Exact())
    with deltafmt.open(alone) as one, deltafmt.open(chain.deltas[1]) as two:
        assert one.content_id != two.content_id
        assert list(one) == list(two)


WRONG = {
    "missing": (
        (0, 2),
        WrongBaseError,
        ["a link is missing before", "d3.deltafmt", "d1.deltafmt is the delta", "or squash"],
    ),
    "first missing": ((1, 2), WrongBaseError, ["wrong base", "d2.deltafmt was made on what the delta", "comes before"]),
    "reordered": ((0, 2, 1), WrongBaseError, ["wrong order", "d3.deltafmt", "d2.deltafmt", "stands behind"]),
    "backwards": ((1, 0), WrongBaseError, ["d1.deltafmt has no parent", "d2.deltafmt gives"]),
    "twice": ((0, 1, 1), UsageError, ["stands twice", "d2.deltafmt"]),
    "pruned": ((2,), WrongBaseError, ["wrong base", "d3.deltafmt was made on what the delta"]),
}


@pytest.mark.parametrize(("order", "error", "words"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_link_is_named(
    chain: Links, tmp_path: Path, order: Sequence[int], error: type[Exception], words: list[str]
) -> None:
    deltas = [chain.deltas[number] for number in order]
    with pytest.raises(error) as found:
        deltafmt.apply(chain.states[0], deltas, tmp_path / "out")
    assert all(word in str(found.value) for word in words), found.value
    assert list(tmp_path.iterdir()) == []
    if len(order) > 1 and "wrong base" not in words:
        with pytest.raises(error):
            deltafmt.squash(deltas, tmp_path / "one.deltafmt", base=chain.states[0])
        with pytest.raises(error):
            deltafmt.verify(deltas[-1], chain.states[0], before=deltas[:-1])


def test_a_foreign_link_is_named(chain: Links, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.deltafmt"
    deltafmt.pack(chain.states[0], chain.folder / "ft2", foreign, method=Exact())
    with pytest.raises(WrongBaseError, match=r"a link is missing before .*d2\.deltafmt: .*foreign\.deltafmt is the"):
        deltafmt.apply(chain.states[0], [foreign, chain.deltas[1]], tmp_path / "out")


def test_a_content_id_that_is_claimed_is_computed_anew(chain: Links, tmp_path: Path) -> None:
    """A file whose trailer claims to be the parent is found out before anything is written."""
    deltafmt.pack(chain.states[0], chain.folder / "ft2", tmp_path / "d.deltafmt", method=Exact())
    data = bytearray((tmp_path / "d.deltafmt").read_bytes())
    head, offset = bytes(data[:64]), int.from_bytes(data[-128:-120], "little")
    data[-128 + 24 : -128 + 56] = deltafmt.open(chain.deltas[1]).container.parent or b""
    data[-40:-8] = blake3(head + bytes(data[offset:-40])).digest()
    path = tmp_path / "forged.deltafmt"
    path.write_bytes(data)
    with pytest.raises(InvalidFileError, match=r"forged\.deltafmt: the content id is not that of the content"):
        deltafmt.apply(chain.states[0], [path, chain.deltas[1]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pack_wants_what_the_parent_gives(chain: Links, tmp_path: Path, cli: Cli) -> None:
    base, finetuned, out = chain.states[0], chain.folder / "ft2", tmp_path / "d.deltafmt"
    arguments = "pack", base, finetuned, "-o", out, "--method", "exact", "--parent", chain.deltas[0]
    refused(cli(*arguments), 4, "v0 is not what", "d1.deltafmt gives", 'tensor "layers.0.weight" differs', "apply")
    assert not out.exists()
    more = write_folder(tmp_path / "more", {**read_folder(chain.states[1]), "x": normal(1, (4,))})
    refused(cli("pack", more, *arguments[2:]), 4, 'it has a tensor "x"')
    refused(
        cli(*arguments[:5], "--plan", "--target-ratio", "2", *arguments[7:]),
        2,
        "--plan and --parent do not go together",
    )
    refused(cli("pack", base, finetuned, "-o", chain.deltas[0], "--force", *arguments[7:]), 2, "is itself an input")
    assert cli("pack", chain.states[1], *arguments[2:]).code == 0
    assert out.read_bytes() == chain.deltas[1].read_bytes()


def test_a_lossy_parent_gives_what_says_so(tmp_path: Path, cli: Cli) -> None:
    """The fine-tune that was packed is not what a lossy delta gives; what unpack wrote is."""
    links = Links(tmp_path, {"a.weight": normal(1, (32, 64))})
    first = links.add({"a.weight": nudge(normal(1, (32, 64)), 2)}, RTN(3))
    after = write_folder(tmp_path / "after", {"a.weight": nudge(normal(1, (32, 64)), 3)})
    options = "-o", tmp_path / "d.deltafmt", "--method", "rtn", "--parent", first
    refused(cli("pack", tmp_path / "ft1", after, *options), 4, '"a.weight" is lossy', "no metadata")
    assert cli("pack", links.states[1], after, *options).code == 0
    deltafmt.apply(links.states[0], [first, tmp_path / "d.deltafmt"], tmp_path / "out")
    pattern = r'"a\.weight" has terms in .* on top of a change in .*apply the chain, and pack'
    with pytest.raises(UsageError, match=pattern):
        deltafmt.squash([first, tmp_path / "d.deltafmt"], tmp_path / "one.deltafmt", base=links.states[0])
    assert not (tmp_path / "one.deltafmt").exists()


def test_squash_copies_what_one_link_changes_and_asks_for_the_base(chain: Links, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "one.deltafmt"
    refused(cli("squash", *chain.deltas, "-o", out), 2, '"layers.0.weight" changes in', "--base FOLDER names the base")
    refused(cli("squash", chain.deltas[0], "-o", out), 2, "alone is no chain")
    result = deltafmt.squash(chain.deltas, out, base=chain.states[0])
    assert (result.copied, result.restored, result.parent) == (3, ["layers.0.weight"], "")
    assert result.size < result.old_size
    deltafmt.unpack(chain.states[0], out, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(chain.states[3])
    with pytest.raises(WrongBaseError, match=r"wrong base .*v1"):
        deltafmt.squash(chain.deltas, tmp_path / "two.deltafmt", base=chain.states[1])
    refused(cli("squash", *chain.deltas, "-o", chain.deltas[0], "--force"), 2, "is itself an input")
    tail = json.loads(cli("squash", *chain.deltas[1:], "-o", out, "--force", "--base", chain.states[1], "--json").out)
    assert tail["parent"] == deltafmt.open(chain.deltas[0]).content_id
    assert (tail["copied"], tail["made_anew"]) == (3, ["layers.0.weight"])
    deltafmt.apply(chain.states[0], [chain.deltas[0], out], tmp_path / "both")
    assert folder_bytes(tmp_path / "both") == folder_bytes(chain.states[3])


def test_squash_needs_no_base_where_each_tensor_changes_once(tmp_path: Path) -> None:
    base: Tensors = {f"layers.{number}.weight": normal(number, (32, 48)) for number in range(3)}
    links = Links(tmp_path, base)
    one = {**base, "layers.0.weight": nudge(base["layers.0.weight"], 7)}
    links.add(one, RTN(3))
    two = {**read_folder(links.states[1]), "layers.1.weight": nudge(base["layers.1.weight"], 8)}
    links.add(two, RTN(4), profile="cold")
    result = deltafmt.squash(links.deltas, tmp_path / "one.deltafmt")
    assert (result.copied, result.restored) == (3, [])
    deltafmt.unpack(links.states[0], tmp_path / "one.deltafmt", tmp_path / "out")
    assert read_folder(tmp_path / "out") == read_folder(links.states[2])
    assert deltafmt.verify(tmp_path / "one.deltafmt", links.states[0]).content_id == result.content_id


def test_verify_takes_a_chain(chain: Links, tmp_path: Path, cli: Cli) -> None:
    out = cli("verify", *chain.deltas, "--base", chain.states[0]).out
    assert "made for this base" in out
    assert f"made for what {chain.deltas[1]} gives on this base (4 tensors compared)" in out
    assert json.loads(cli("verify", *chain.deltas, "--base", chain.states[0], "--json").out)["files"][2]["before"] == [
        str(path) for path in chain.deltas[:2]
    ]
    refused(cli("verify", chain.deltas[1], "--base", chain.states[0]), 4, "d2.deltafmt was made on what the delta")
    assert cli("verify", chain.deltas[1], "--base", chain.states[1]).code == 0
    with pytest.raises(UsageError, match="no base for the first of them"):
        deltafmt.verify(chain.deltas[1], before=chain.deltas[:1])


def test_commands_that_know_one_base_refuse_a_link(chain: Links, tmp_path: Path, cli: Cli) -> None:
    link = chain.deltas[1]
    refused(cli("unpack", chain.states[1], link, "-o", tmp_path / "out"), 2, "was made on what the delta", "apply")
    refused(cli("export-lora", link, "-o", tmp_path / "adapter"), 2, "was made on what the delta", "squash")
    pytest.importorskip("torch")
    with pytest.raises(UsageError, match=r"was made on what the delta .* gives, and not on a base; squash"):
        deltafmt.torch.load(link, device="cpu")


def test_a_deep_chain_computes_each_link_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a link gives is kept until the next one has used it, and no longer."""
    base: Tensors = {f"layers.{number}.weight": normal(number, (16, 16)) for number in range(3)}
    links = Links(tmp_path, base)
    for number in range(6):
        links.add({name: nudge(tensor, number, scale=0.01) for name, tensor in read_folder(links.states[-1]).items()})
    from deltafmt.pipeline import chain as module

    computed: list[tuple[str, str]] = []
    states: list[module.LinkState] = []
    compute = module.LinkState._compute

    def counted(self: module.LinkState, name: str) -> Any:
        computed.append((self.delta.container.name, name))
        states.append(self)
        return compute(self, name)

    monkeypatch.setattr(module.LinkState, "_compute", counted)
    deltafmt.apply(links.states[0], links.deltas, tmp_path / "out", threads=2)
    assert len(computed) == len(set(computed)) == 5 * 3
    assert all(not state._held for state in states)


def test_names_of_the_model_may_differ_and_tensors_may_move(tmp_path: Path) -> None:
    """A prefix in the model, a stack of experts between two links: squash says what it cannot follow."""
    experts: Tensors = {f"model.layers.0.mlp.experts.{n}.up_proj.weight": normal(n, (8, 16)) for n in range(2)}
    base: Tensors = {"model.embed_tokens.weight": normal(9, (30, 16)), **experts}
    links = Links(tmp_path, base)
    links.add({name: nudge(tensor, 3, scale=0.01) for name, tensor in base.items()})
    tensors = read_folder(links.states[1])
    stack = Raw("BF16", (2, 8, 16), b"".join(tensors[name].data for name in experts))
    stacked = {name: tensor for name, tensor in tensors.items() if name not in experts}
    links.add({**stacked, "model.layers.0.mlp.experts.up_proj": nudge(stack, 4, scale=0.01)})
    moved = write_folder(tmp_path / "moved", {f"language.{name}": tensor for name, tensor in base.items()})
    result = deltafmt.apply(moved, links.deltas, tmp_path / "out", rename=["model=language.model"])
    assert read_folder(tmp_path / "out") == read_folder(links.states[2])
    assert len(result.applied) == 2
    assert deltafmt.open(links.deltas[1])["model.layers.0.mlp.experts.up_proj"].base is not None
    with pytest.raises(UsageError, match=r"is made of parts of what .* gives; apply the chain, and pack"):
        deltafmt.squash(links.deltas, tmp_path / "one.deltafmt", base=links.states[0])
