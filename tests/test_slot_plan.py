"""Deltas of a known layout get their slots as a plan says, and everything is as if they were put there one by one."""

from __future__ import annotations

import functools
import gc
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import deltafmt
from delta_files import DeltaWriter
from deltafmt.kernels.operand_records import OperandRecords
from deltafmt.kernels.record_memory import RecordMemory
from deltafmt.kernels.table import OperandTable, record_of
from deltafmt.runtime.binding import Binding, bind
from deltafmt.runtime.delta_store import copy_delta
from deltafmt.runtime.device_delta import DeviceDelta
from deltafmt.runtime.device_views import DeviceTensors
from deltafmt.runtime.placement import Placement
from deltafmt.runtime.served_modules import ServedModules
from deltafmt.runtime.slot_plan import ADDRESS_ALIGNMENT, SlotPlans
from deltafmt.runtime.upload import load_placed
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from strategies import dense_layouts, examples, fitting, layouts, shapes, sparse_layouts
from tiny_models import new_model

CPU = torch.device("cpu")
SEEDED = NMLayout(1, 32, 4)


def load(data: bytes) -> DeviceDelta:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "d.deltafmt")
        path.write_bytes(data)
        with deltafmt.open(path) as file:
            placed = Placement.ahead(file.container, list(file))
        return load_placed(str(path), CPU, placed)


@examples(20)
@given(st.data(), st.integers(0, 2**32 - 1))
def test_records_of_any_layout(data: st.DataObject, seed: int) -> None:
    any_layout = st.one_of(st.sampled_from(("seeded", "fixed")).flatmap(layouts), dense_layouts(), sparse_layouts())
    drawn: list[tuple[tuple[int, int], list[TermLayout]]] = []
    for _ in range(data.draw(st.integers(1, 4))):
        shape = data.draw(shapes(140, 120))
        drawn.append((shape, [fitting(data.draw(any_layout), *shape) for _ in range(data.draw(st.integers(1, 2)))]))
    # Tensors of the same random numbers have the same slots, and other seeds follow.
    deltas = []
    for number in range(2):
        made = DeltaWriter(np.random.default_rng(seed))
        for at, (shape, terms) in enumerate(drawn):
            made.add(f"t{at}", shape, terms)
        for entry in made.entries:
            for term in entry.terms:
                if term.layout.seeded:
                    object.__setattr__(term, "seed", (term.seed + number) % 2**32)
        deltas.append(load(made.finish()))
    first, second = (delta.tensors for delta in deltas)
    assert isinstance(first, DeviceTensors)
    assert isinstance(second, DeviceTensors)
    assert first.layout is second.layout
    assert first.seeds is not None
    assert second.seeds is not None
    chosen = [(f"t{at}", term) for at, (_, terms) in enumerate(drawn) for term in range(len(terms))]
    chosen = data.draw(st.permutations(chosen)) + chosen[:1]
    operands = [first[name].terms[term] for name, term in chosen]
    made_of = OperandRecords(operands, first.address, [first.layout.seeds[name] + term for name, term in chosen])
    for tensors in (first, second):
        assert tensors.seeds is not None
        wanted = [value for name, term in chosen for value in record_of(tensors[name].terms[term])]
        assert made_of.of(tensors.address, tensors.seeds).tolist() == wanted


MODEL: dict[str, Any] = {"num_hidden_layers": 1, "attention_bias": True}


@functools.cache
def shapes_of_model() -> dict[str, tuple[int, ...]]:
    return {name: tuple(held.shape) for name, held in new_model("llama", **MODEL).named_parameters()}


def file(seed: int, how: str) -> bytes:
    """Write a delta of the tiny model, of random bytes."""
    made = DeltaWriter(np.random.default_rng(seed))
    kinds: dict[str, list[TermLayout]] = {
        "sum": [SEEDED, SEEDED],
        "lowbit": [LowbitLayout(4, scale_group=32)],
        "mixed": [LowRankLayout(4, "BF16")],
    }
    for name, shape in sorted(shapes_of_model().items()):
        if len(shape) == 1:
            if how == ("biases" if name.endswith(".bias") else "norms"):
                made.replace(name, "BF16", shape)
        elif how == "biases":
            continue
        elif "proj" in name:
            if how == "half" and ("k_proj" in name or "layers.0.mlp" in name):
                continue
            if how == "whole" and "up_proj" in name:
                made.replace(name, "BF16", shape)
                continue
            terms = kinds.get(how, [SEEDED])
            made.add(name, (shape[0], shape[1]), terms if how != "mixed" or "v_proj" in name else [SEEDED])
        elif how == "norms":
            made.add(name, (shape[0], shape[1]), [NMLayout(2, 16, 2)])
    return made.finish()


HOWS = ("plain", "half", "norms", "whole", "sum", "lowbit", "mixed", "biases")


@functools.cache
def delta(number: int, how: str) -> DeviceDelta:
    return load(file(100 + number, how))


class CopyingMemory(RecordMemory):
    """Records whose device is a second tensor, as on a GPU."""

    def _new_chunk(self, length: int) -> Any:
        chunk = super()._new_chunk(length)
        chunk.device = torch.full_like(chunk.host, -1)
        return chunk


class Served:
    """The modules of a model of their own, whose tables are written as on a GPU if that is asked for."""

    def __init__(self, *, as_on_gpu: bool) -> None:
        self.model = new_model("llama", **MODEL)
        self.as_on_gpu = as_on_gpu
        with mock.patch("deltafmt.runtime.served_modules.RecordMemory", CopyingMemory):
            self.modules = ServedModules(self.model, CPU, lambda: None, lambda: True, fuse=True)
        self.bindings: dict[str, Binding] = {}

    def bind(self, how: str) -> Binding:
        """Bind a delta to the model."""
        entries = {name: tensor.entry for name, tensor in delta(0, how).items()}
        found = bind(self.model, entries)
        self.modules.prepare(found.modules)
        return found

    def within(self, work: Callable[[], Any]) -> None:
        """Do something as on a GPU: what it brings to the device is written there."""
        refresh = self.modules._refresh

        def refreshed() -> None:
            self.modules._device = torch.device("cuda")
            refresh()
            self.modules._device = CPU

        with mock.patch.object(self.modules, "_refresh", refreshed if self.as_on_gpu else refresh):
            work()

    def assign(self, name: str, number: int, how: str) -> None:
        """Give a delta a slot."""
        binding = self.bind(how)
        self.within(lambda: self.modules.assign(name, delta(number, how), binding))
        self.bindings[name] = binding

    def release(self, name: str) -> None:
        """Take a delta's slot."""
        self.modules.release(name)
        del self.bindings[name]
        self.within(self.modules._bring)

    def rebuild(self) -> None:
        """Make the sites anew."""
        modules = [bound for binding in self.bindings.values() for bound in binding.modules]
        self.within(lambda: self.modules.rebuild(self.bindings, modules))
        self.within(self.modules._bring)

    def tables(self) -> dict[str, OperandTable]:
        """Return all tables by the names of their modules."""
        groups = {id(group): group for group in self.modules._groups.values()}.values()
        found = {site.name: site.table.operands for site in self.modules.sites() if hasattr(site, "table")}
        return found | {"+".join(site.name for site in group.sites): group.table for group in groups}

    def state(self) -> list[object]:
        """Return all that a call would find, without reading records that are not on the device yet."""
        found: list[object] = [sorted(self.modules._slots.items())]
        for site in sorted(self.modules.sites(), key=lambda one: one.name):
            held = {slot: sorted(site.held(slot).items(), key=str) for slot in sorted(site.slots)}
            found.append((site.name, sorted(site.slots), sorted(site.tensors), str(held), site.multiplies_only))
            assert site.hooked or site.multiplies_only, site.name
        for name, table in sorted(self.tables().items()):
            slots = range(table.slots)
            operands = [
                tuple(tuple(record_of(operand) for operand in terms) for terms in table.operands(slot))
                for slot in slots
            ]
            bounds = [(slot, one) for slot, one in sorted(table.bounded(), key=str)]
            found.append((name, operands, [table.forms(slot) for slot in slots], bounds, table.token_limit))
            found.append(
                sorted(
                    str(
                        (
                            key,
                            records.tensor[records.tensor.any(2)].tolist(),
                            str(records.tensor.any(2).nonzero().tolist()),
                        )
                    )
                    for key, records in table._tables.items()
                    if records.tensor.any()
                )
            )
        groups = {id(group): group for group in self.modules._groups.values()}.values()
        found += sorted(("+".join(site.name for site in group.sites), sorted(group.slots)) for group in groups)
        return found

    def read(self) -> list[object]:
        """Return the records as kernels would read them."""
        return [
            (name, sorted(str(one.tolist()) for one in table.records() if one.any()))
            for name, table in sorted(self.tables().items())
        ]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["enter"] * 6 + ["leave"] * 3 + ["grow", "rebuild", "compile", "read", "call"]),
        st.integers(0, 5),
        st.integers(0, 1),
    ),
    min_size=6,
    max_size=16,
)


def around(action: str) -> list[tuple[str, int, int]]:
    """Return steps of one layout in which something else happens while a delta that entered by a plan is there."""
    enter = [("enter", number, 0) for number in range(4)]
    return [*enter[:2], (action, 0, 0), *enter[2:], *(("leave", number, 0) for number in (1, 3, 0)), ("enter", 5, 1)]


# Two deltas of one layout, each in the slot that one of another layout has left, and a call with each.
BY_TURNS = [(action, number, number % 2) for number in range(4) for action in ("enter", "call", "leave")][:-1]


@examples(6)
@example(BY_TURNS, ["plain", "biases"], False)
@example(around("grow"), ["plain", "half"], True)
@example(around("rebuild"), ["norms", "lowbit"], True)
@example(around("compile"), ["lowbit", "whole"], True)
@example(around("read"), ["sum", "mixed"], False)
@given(STEPS, st.lists(st.sampled_from(HOWS), min_size=2, max_size=2), st.booleans())
def test_any_order_of_deltas(steps: list[tuple[str, int, int]], hows: list[str], as_on_gpu: bool) -> None:
    planned, plain = Served(as_on_gpu=as_on_gpu), Served(as_on_gpu=as_on_gpu)
    inside: dict[str, tuple[int, str]] = {}
    for action, number, which in steps:
        name, how = f"d{number}", hows[which]
        for served in (planned, plain):
            with mock.patch.object(SlotPlans, "learn") if served is plain else mock.MagicMock():
                if action == "enter" and name not in inside:
                    served.assign(name, number % 3, how)
                elif action == "leave" and name in inside:
                    served.release(name)
                elif action == "grow":
                    with served.modules._lock:
                        served.modules._grow(served.modules.count + 2)
                    served.within(served.modules._bring)
                elif action == "rebuild":
                    served.rebuild()
                elif action == "call":
                    served.modules._settle(set(served.modules._groups.values()))  # as its last module does
                elif action == "compile":
                    served.within(lambda served=served: served.modules.ready(None, 1))
        if action == "enter":
            inside.setdefault(name, (number, how))
        elif action == "leave":
            inside.pop(name, None)
        assert planned.state() == plain.state()
        if action == "read":
            assert planned.read() == plain.read()
    assert planned.read() == plain.read()


def test_aliases_of_other_tensors_are_another_layout() -> None:
    shapes = shapes_of_model()
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "kv"]

    def tied(target: str) -> DeviceDelta:
        made = DeltaWriter(np.random.default_rng(0))
        for name in names:
            made.add(name, (shapes[name][0], shapes[name][1]), [SEEDED])
        made.alias("model.layers.1.self_attn.k_proj.weight", target)
        return load(made.finish())

    one, other, again = (tied(target).tensors for target in (*names, names[0]))
    assert isinstance(one, DeviceTensors)
    assert isinstance(other, DeviceTensors)
    assert isinstance(again, DeviceTensors)
    assert one.layout is again.layout
    assert one.layout is not other.layout


@pytest.mark.parametrize("how", ["plain", "half", "lowbit"])
def test_nothing_is_made_of_a_further_delta(how: str) -> None:
    served = Served(as_on_gpu=True)
    served.assign("a", 0, how)
    further = load(file(7, how))
    assert isinstance(further.tensors, DeviceTensors)
    binding = served.bind(how)
    served.within(lambda: served.modules.assign("b", further, binding))
    assert not further.tensors._made
    assert all(table.forms(1) for table in served.tables().values())
    assert not further.tensors._made


def test_what_leaves_is_forgotten() -> None:
    served = Served(as_on_gpu=True)
    served.assign("a", 0, "norms")
    for _ in range(2):
        further = load(file(7, "norms"))
        kept = weakref.ref(further.tensors)
        served.within(lambda further=further: served.modules.assign("b", further, served.bind("norms")))
        assert any(table.operands(1)[0] for table in served.tables().values())
        served.modules.release("b")
        del further
        gc.collect()
        assert kept() is None


def test_an_allocation_that_begins_elsewhere_is_put_there_tensor_by_tensor() -> None:
    served = Served(as_on_gpu=True)
    served.assign("a", 0, "plain")
    further = load(file(7, "plain"))
    memory = torch.empty(further.nbytes + 16, dtype=torch.uint8)[16:]
    moved = copy_delta(further, lambda _: memory)
    assert isinstance(moved.tensors, DeviceTensors)
    assert (moved.tensors.address - delta(0, "plain").tensors.address) % ADDRESS_ALIGNMENT  # type: ignore[attr-defined]
    served.within(lambda: served.modules.assign("b", moved, served.bind("plain")))
    for table in served.tables().values():
        for records in table.records():
            for part, terms in enumerate(table.operands(1)):
                assert records[1, part].tolist() == record_of(terms[0])
