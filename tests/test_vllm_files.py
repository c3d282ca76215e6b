"""Files of a worker's deltas, names of a resolver, versions and options of the plugin for vLLM."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

import deltafmt
from deltafmt.errors import InvalidFileError, StorageError, UsageError
from deltafmt.vllm import check_names, engine, manager, seam, worker
from deltafmt.vllm.engine import Known
from deltafmt.vllm.files import FileHandles
from deltafmt.vllm.names import is_delta
from deltafmt.vllm.options import KEY, Options, stamp
from deltafmt.vllm.resolver import find
from deltafmt.vllm.worker import expanded


@dataclass
class Text:
    """What a file holds."""

    content_id: str


def read(path: str) -> Text:
    return Text(Path(path).read_text())


def test_a_file_that_was_deleted_or_replaced_is_still_the_one_that_was_loaded(tmp_path: Path) -> None:
    files = FileHandles(4)
    path = tmp_path / "a"
    path.write_text("first")
    assert files.load(1, str(path), read).content_id == "first"
    path.unlink()
    assert files.load(1, str(path), read).content_id == "first"
    path.write_text("second")
    assert files.load(1, str(path), read).content_id == "first"
    assert files.load(1, str(path), read, again=True).content_id == "second"
    assert files.load(2, str(path), read).content_id == "second"
    path.write_text("changed in its place")
    with pytest.raises(StorageError, match=r"a changed since it was loaded: content id changed in its p, not second"):
        files.load(1, str(path), read)
    with pytest.raises(UsageError, match=r"adapter 1 is .*a; give .*b a number of its own, or load it in place"):
        files.load(1, str(tmp_path / "b"), read)
    assert files.sharing(2) == ("second", {1, 2})
    assert files.sharing(3) == ("", set())
    files.close()
    assert files.count == 0


def test_only_so_many_files_stay_open(tmp_path: Path) -> None:
    files = FileHandles(2)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        (tmp_path / str(number)).write_text(str(number))
        files.load(number, str(tmp_path / str(number)), read)
    assert files.count == 2
    assert len(os.listdir("/proc/self/fd")) == before + 2
    (tmp_path / "0").write_text("other")  # closed before: what its path leads to is compared
    with pytest.raises(StorageError, match="changed since it was loaded"):
        files.load(0, str(tmp_path / "0"), read)
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.deltafmt"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(StorageError, match=r"x\.deltafmt"):
        FileHandles(2).load(1, str(path), read)


def test_a_file_that_cannot_be_loaded_in_place_leaves_the_one_before(tmp_path: Path) -> None:
    files = FileHandles(2)
    path = tmp_path / "a"
    path.write_text("first")
    files.load(1, str(path), read)
    path.unlink()
    with pytest.raises(StorageError):
        files.load(1, str(path), read, again=True)
    path.write_text("second")
    assert files.load(1, str(path), read).content_id == "first"
    (tmp_path / "b").write_text("third")
    assert files.load(1, str(tmp_path / "b"), read, again=True).content_id == "third"
    assert files.path(1, "given") == str(tmp_path / "b")
    assert files.path(2, "given") == "given"
    files.close()


def test_a_file_that_cannot_be_loaded_is_closed(tmp_path: Path) -> None:
    def fail(path: str) -> Text:
        raise InvalidFileError(path)

    (tmp_path / "a").write_text("a")
    before = len(os.listdir("/proc/self/fd"))
    files = FileHandles(2)
    with pytest.raises(InvalidFileError):
        files.load(1, str(tmp_path / "a"), fail)
    assert (files.count, len(os.listdir("/proc/self/fd"))) == (0, before)


def test_a_resolver_finds_names_and_never_leaves_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "deltas"
    (folder / "team").mkdir(parents=True)
    (folder / "hub").mkdir()
    for path in (folder / "math.deltafmt", folder / "team/code.deltafmt", folder / "hub/any.deltafmt"):
        path.write_text("x")
    (tmp_path / "secret.deltafmt").write_text("x")
    (folder / "link.deltafmt").symlink_to(tmp_path / "secret.deltafmt")
    (folder / "two").mkdir()
    for name in ("a", "b"):
        (folder / "two" / f"{name}.deltafmt").write_text("x")
    root = folder.resolve()
    assert find(str(folder), "math") == str(root / "math.deltafmt")
    assert find(str(folder), "team/code") == str(root / "team/code.deltafmt")
    assert find(str(folder), "hub") == str(root / "hub/any.deltafmt")
    for name in ("nothing", "two", "../secret", str(tmp_path / "secret"), "link", "", ".", "a\0b"):
        assert find(str(folder), name) is None, name


def test_versions_outside_the_range_are_refused_with_the_range() -> None:
    assert seam.refusal("0.32.0") == ""
    assert seam.refusal("0.27.1+cpu") == ""
    for version in ("0.26.0", "0.33.0", "1.0.0", "main", None):
        assert "0.27 to 0.32" in seam.refusal(version)


def test_names_are_looked_for_in_sources_without_running_them(tmp_path: Path) -> None:
    for module, names in seam.NAMES.items():
        path = tmp_path / f"{module.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        owners: dict[str, list[str]] = {}
        for name in names:
            owner, _, method = name.partition(".")
            owners.setdefault(owner, []).extend([method] if method else [])
        lines = ["raise SystemExit"]
        for owner, methods in owners.items():
            lines += [f"class {owner}:", "    pass", *(f"    def {method}(self): ..." for method in methods)]
        path.write_text("\n".join(lines) + "\n")
    assert check_names.missing(check_names.reader(tmp_path)) == []
    module = tmp_path / "vllm/lora/worker_manager.py"
    module.write_text(module.read_text().replace("_load_adapter", "_load"))
    (tmp_path / "vllm/exceptions.py").unlink()
    lacks = ["vllm.exceptions: the module", "vllm.lora.worker_manager: WorkerLoRAManager._load_adapter"]
    assert check_names.missing(check_names.reader(tmp_path)) == lacks
    assert check_names.main([str(tmp_path)]) == 1


def test_options_are_read_checked_and_stamped() -> None:
    config = SimpleNamespace(additional_config={KEY: {"open_files": 3}})
    assert Options.of(config) == Options(open_files=3)
    stamp(config)
    assert config.additional_config[KEY]["plugin"]
    assert Options.of(config) == Options(open_files=3)
    assert Options.of(SimpleNamespace()) == Options()
    with pytest.raises(UsageError, match='no option "opens" in vLLM; it has open_files'):
        Options.of(SimpleNamespace(additional_config={KEY: {"opens": 3}}))
    with pytest.raises(UsageError, match=r'"open_files" of deltafmt is a number of at least 0, not \'3\''):
        Options.of(SimpleNamespace(additional_config={KEY: {"open_files": "3"}}))
    with pytest.raises(UsageError, match="an object of names and values"):
        Options.of(SimpleNamespace(additional_config={KEY: 1}))


def test_rows_without_an_adapter_take_none_from_the_last_slot() -> None:
    def own(inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, indices: torch.Tensor) -> None:
        output += torch.einsum("bi,boi->bo", inputs, weights[indices])

    weights, output = torch.ones(2, 3, 4), torch.zeros(3, 3)
    expanded(own, torch.ones(3, 4), weights, output, torch.tensor([1, -1, 0]))
    assert output.tolist() == [[4.0] * 3, [0.0] * 3, [4.0] * 3]


def test_a_step_without_adapters_multiplies_with_none() -> None:
    def own(_wrapper: Any, y: list[int]) -> None:
        y.append(1)

    y: list[int] = []
    worker._products(own, SimpleNamespace(deltafmt_idle=True), y)
    assert y == []
    worker._products(own, SimpleNamespace(deltafmt_idle=False), y)
    worker._products(own, SimpleNamespace(), y)
    assert y == [1, 1]


def asked(name: str, path: Path, number: int) -> SimpleNamespace:
    return SimpleNamespace(lora_name=name, lora_path=str(path), lora_int_id=number, load_inplace=False)


def test_keys_of_the_prefix_cache_follow_the_content(delta: Path, tmp_path: Path) -> None:
    known = Known()
    copy = tmp_path / "copy.deltafmt"
    copy.write_bytes(delta.read_bytes())
    first = asked("a", copy, 1)
    assert known.key(first) == known.key(asked("b", delta, 2))  # the same content by another name
    assert not known.is_ready(first)
    known.note_loaded(first, again=False)
    assert known.is_ready(first)
    before = known.key(first)
    copy.write_bytes(b"another file")
    assert known.key(first) == before  # of what was loaded
    known.renew(first)
    known.note_loaded(first, again=True)
    assert known.key(first) not in (before, known.key(asked("b", delta, 2)))
    missing = asked("c", tmp_path / "missing.deltafmt", 3)
    alone = known.key(missing)
    known.note_failed(missing)
    assert known.key(missing) != alone
    replaced = asked("d", tmp_path / "replaced.deltafmt", 4)
    replaced.lora_path = str(delta)
    before = known.key(replaced)
    replaced.lora_path = str(copy)
    known.note_loaded(replaced, again=False)  # the path led elsewhere when the delta was loaded
    assert known.key(replaced) != before


@dataclass
class Asked:
    """A request as vLLM's engine sees it; its hash is what the name of each of its blocks is made of."""

    lora_request: Any
    request_id: str = "r"
    num_computed_tokens: int = 0
    block_hashes: list[str] = field(default_factory=list)

    def update_block_hashes(self) -> None:
        """Name one more block."""
        self.block_hashes += engine._keys(lambda _: ["an adapter of vLLM"], self)


@pytest.fixture(scope="module")
def other_delta(tmp_path_factory: pytest.TempPathFactory, small: Any) -> Path:
    path = tmp_path_factory.mktemp("other") / "other.deltafmt"
    deltafmt.pack(small.finetuned, small.base, path)
    return path


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(engine, "_known", Known())
    executor = SimpleNamespace(add_lora=lambda _: True)
    return SimpleNamespace(model_executor=executor, scheduler=SimpleNamespace(requests={}))


def test_blocks_of_requests_are_named_anew_when_another_delta_takes_their_number(
    delta: Path, other_delta: Path, tmp_path: Path, core: Any
) -> None:
    path = tmp_path / "x.deltafmt"
    path.write_bytes(delta.read_bytes())
    added = []
    request = Asked(asked("x", path, 1))
    request.update_block_hashes()
    first = list(request.block_hashes)
    engine._add_request(lambda _core, request: added.append(request), core, request)
    assert (added, request.block_hashes) == ([request], first)
    core.scheduler.requests["r"] = request
    begun, other = (Asked(asked("x", path, 1), name, 32) for name in ("begun", "other"))
    for one in (begun, other):
        one.update_block_hashes()
        core.scheduler.requests[one.request_id] = one
    waiting = Asked(asked("x", path, 1))  # has come, and was not added yet
    waiting.update_block_hashes()
    path.write_bytes(other_delta.read_bytes())
    wish = asked("x", path, 1)
    wish.load_inplace = True
    engine._add_lora(lambda _core, _wish: True, core, wish)
    engine._add_request(lambda _core, request: added.append(request), core, waiting)
    assert waiting.block_hashes == request.block_hashes
    assert request.block_hashes != first
    # What one delta began and the other goes on with, nobody shares: not now, and not with later blocks.
    for one in (begun, other):
        one.update_block_hashes()
        assert not {*one.block_hashes} & {*first, *request.block_hashes}
    assert not {*begun.block_hashes} & {*other.block_hashes}
    # Loaded by another number, the new content has blocks of its own, and the old content has the old ones.
    for number, source in ((2, other_delta), (3, delta)):
        fresh = Asked(asked("y", source, number))
        fresh.update_block_hashes()
        engine._add_request(lambda _core, request: added.append(request), core, fresh)
        assert (fresh.block_hashes == first) is (source is delta)
        assert fresh.block_hashes != request.block_hashes


def test_a_file_that_is_replaced_between_a_request_and_its_load_lends_its_blocks_to_nobody(
    delta: Path, other_delta: Path, tmp_path: Path, core: Any
) -> None:
    path = tmp_path / "x.deltafmt"
    path.write_bytes(delta.read_bytes())
    request = Asked(asked("x", path, 1))
    request.update_block_hashes()
    first = list(request.block_hashes)
    path.write_bytes(other_delta.read_bytes())
    engine._add_request(lambda *_: None, core, request)
    assert request.block_hashes != first


def test_a_number_belongs_to_a_delta_or_to_an_adapter(delta: Path, core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[Any] = []
    monkeypatch.setattr(engine.seam, "name", lambda *_: str)  # an engine of this process, which raises

    def add(request: Asked) -> None:
        engine._add_request(lambda _core, request: added.append(request), core, request)

    first, adapter = Asked(asked("x", delta, 1)), Asked(asked("y", Path("lora"), 2))
    add(first)
    add(adapter)
    for name, path, number, kind in (("y", Path("lora"), 1, "a delta"), ("x", delta, 2, "an adapter")):
        request = asked(name, path, number)
        line = rf"number {number} is that of {kind}; give .* a number of its own"
        with pytest.raises(ValueError, match=line):
            add(Asked(request))
        request.load_inplace = True
        with pytest.raises(ValueError, match=line):
            engine._add_lora(lambda _core, _request: True, core, request)
    assert added == [first, adapter]


@pytest.mark.parametrize("way", ["request", "load"])
def test_a_number_whose_load_failed_belongs_to_nothing(
    delta: Path, tmp_path: Path, core: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(engine.seam, "name", lambda *_: str)

    def fail(*_: Any) -> bool:
        raise ValueError("cannot be loaded")

    def add(own: Any, request: Any) -> None:
        core.model_executor.add_lora = own
        if way == "load":
            engine._add_lora(own, core, request)
        else:
            engine._add_request(own, core, Asked(request))

    def fails(request: Any) -> None:
        with pytest.raises(ValueError, match="cannot be loaded"):
            add(fail, request)

    def loads(request: Any) -> None:
        add(lambda *_: True, request)

    fails(asked("x", tmp_path / "missing.deltafmt", 1))
    fails(asked("x", tmp_path / "lora", 1))
    loads(asked("x", delta, 1))
    fails(asked("x", delta.with_name("other.deltafmt"), 1))  # and what was loaded keeps its number
    with pytest.raises(ValueError, match="number 1 is that of a delta"):
        engine._add_lora(fail, core, asked("y", tmp_path / "lora", 1))
    fails(asked("x", tmp_path / "missing.deltafmt", 2))
    loads(asked("x", tmp_path / "lora", 2))


def test_a_number_is_free_once_its_adapter_was_removed_and_no_request_has_it(delta: Path, core: Any) -> None:
    first, second = asked("x", delta, 1), asked("y", Path("lora"), 1)
    core.scheduler.requests = {"base": Asked(None), "other": Asked(asked("z", delta, 2)), "r": Asked(first)}

    def add(request: Any) -> bool:
        return bool(engine._add_lora(lambda *_: True, core, request))

    assert add(first)
    assert engine._remove_lora(lambda _core, number: number == 1, core, 1)
    with pytest.raises(ValueError, match="number 1 is that of a delta"):
        add(second)  # a worker would take it for the delta of the request
    del core.scheduler.requests["r"]
    assert not engine._remove_lora(lambda *_: False, core, 1)
    assert add(second)
    with pytest.raises(ValueError, match="number 1 is that of an adapter"):
        add(first)
    assert engine._remove_lora(lambda *_: True, core, 1)
    assert add(first)


def test_a_worker_drops_what_a_failed_load_left_when_the_other_kind_takes_its_number() -> None:
    class Own:
        def add_adapter(self, lora_request: Any) -> bool:
            held.setdefault(lora_request.lora_int_id, "loaded")
            return True

    class Worker(manager.DeltaWorkerManager, Own):
        def __init__(self) -> None:
            self._files, self._stepping = FileHandles(4), False
            self._adapter_manager = SimpleNamespace(list_adapters=lambda: held, remove_adapter=held.pop)

    held: dict[int, Any] = {1: manager.DeltaAdapter(), 2: "an adapter", 3: manager.DeltaAdapter(), 4: "an adapter"}
    kept = dict(held)
    for number, path in ((1, "lora"), (2, "x.deltafmt"), (3, "y.deltafmt"), (4, "lora")):
        assert Worker().add_adapter(asked("x", Path(path), number))
    assert held == {1: "loaded", 2: "loaded", 3: kept[3], 4: kept[4]}


def test_a_file_is_loaded_if_all_processes_have_loaded_the_same(tmp_path: Path) -> None:
    files = FileHandles(4)
    path = tmp_path / "a"
    path.write_text("first")
    said: list[str] = []

    def agree(content_id: str) -> bool:
        said.append(content_id)
        return content_id != "second"

    assert files.load(1, str(path), read, agree=agree).content_id == "first"
    path.unlink()
    path.write_text("second")
    with pytest.raises(StorageError, match="processes have not all loaded the same file"):
        files.load(1, str(path), read, again=True, agree=agree)
    assert files.load(1, str(path), read, agree=agree).content_id == "first"
    with pytest.raises(StorageError, match="no such file"):
        files.load(2, str(tmp_path / "b"), read, agree=agree)
    with pytest.raises(ZeroDivisionError):
        files.load(2, str(path), lambda _: 1 // 0, agree=agree)  # type: ignore[arg-type, return-value]
    with pytest.raises(UsageError, match="a number of its own"):
        files.load(1, str(tmp_path / "b"), read, agree=agree)
    # Each process says one thing a load, whatever happens: the others wait for it.
    assert said == ["first", "second", "first", "", "", ""]
    assert files.count == 1


@pytest.mark.parametrize("kind", ["base", "weights"])
def test_a_process_that_serves_no_delta_says_so_to_those_that_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(manager, "load_delta", lambda *_: Text("first"))
    path = tmp_path / "x.deltafmt"
    path.write_text("first")
    said: list[str] = []
    for serves in (True, False):
        one: Any = object.__new__(manager.DeltaWorkerManager)
        one._files, one._lost, one._stepping = FileHandles(4), set(), False
        one._agree = lambda content_id: said.append(content_id) or True
        base = None if kind == "base" and not serves else "a base"
        served = SimpleNamespace(weights_changed=kind == "weights" and not serves)
        one._adapter_manager = SimpleNamespace(base=base, refusal="no folder", served=served)
        if serves:
            assert one._load(asked("x", path, 1), str(path)).content_id == "first"
        else:
            line = {"base": "served by this engine: no folder", "weights": "weights were replaced"}[kind]
            with pytest.raises(UsageError, match=line):
                one._load(asked("x", path, 1), str(path))
    assert said == ["first", ""]


def test_names_of_deltas() -> None:
    assert is_delta("x.deltafmt")
    assert not is_delta("x")


def test_another_model_runner_serves_no_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runner:
        device = torch.device("meta")

    models = SimpleNamespace(base="a base", refusal="")

    def own(runner: Any, model: Any, _config: Any) -> Any:
        runner.lora_manager = SimpleNamespace(_adapter_manager=models)
        return model

    monkeypatch.setattr(seam, "name", lambda *_: Runner)
    config = SimpleNamespace(additional_config={}, compilation_config=SimpleNamespace(mode=3))
    assert worker._load(own, Runner(), "a model", config) == "a model"
    assert (models.base, models.refusal) == ("a base", "")
    assert worker._load(own, SimpleNamespace(), "a model", config) == "a model"
    assert models.base is None
    assert models.refusal.endswith("set VLLM_USE_V2_MODEL_RUNNER=0")
