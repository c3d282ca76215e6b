"""Calibration texts and folders: documents, tokens, tokenizers, and a model that is loaded from its folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from deltafmt.calibration.run import RunOptions, calibrate_folder
from deltafmt.calibration.text import Document, read_documents
from deltafmt.calibration.tokens import Encoder, batches, cut, load_encoder
from deltafmt.errors import InvalidFileError, StorageError, UsageError
from tiny_models import new_model

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


def test_texts_and_states_need_no_torch() -> None:
    modules = ", ".join(
        f"deltafmt.calibration.{name}" for name in ("text", "tokens", "state", "moment_store", "callbacks")
    )
    code = f"import sys, {modules}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def write_lines(path: Path, *objects: Any) -> Path:
    path.write_text("\n".join(json.dumps(obj) for obj in objects) + "\n\n", "utf-8")
    return path


def test_texts(tmp_path: Path) -> None:
    lines = write_lines(
        tmp_path / "a.jsonl",
        {"text": "one\u2028line"},
        {"prompt": "2 + 2 =", "completion": " 4"},
        {"question": "q", "answer": "a", "other": 3},
    )
    assert read_documents(lines) == [
        Document(("one\u2028line",), ended=False),
        Document(("2 + 2 =", " 4"), ended=True),
        Document(("q", "a"), ended=True),
    ]
    plain = tmp_path / "plain.txt"
    plain.write_text('{"text": "not parsed"}\nmore')
    assert read_documents(plain) == [Document(('{"text": "not parsed"}\nmore',), ended=False)]
    for name, content, error, message in (
        ("empty.txt", b" \n", UsageError, "the calibration text is empty"),
        ("empty.jsonl", b"\n\n", UsageError, "the calibration text is empty"),
        ("blank.jsonl", b'{"text": ""}', UsageError, "the calibration text is empty"),
        ("bad.jsonl", b'{"text": "a"}\n{', InvalidFileError, "line 2 is not JSON"),
        ("deep.jsonl", b"[" * 100000, InvalidFileError, "line 1 is not JSON"),
        (
            "field.jsonl",
            b'{"content": "a"}',
            InvalidFileError,
            'line 1 is not an object with one of: "text", "prompt" and',
        ),
        ("list.jsonl", b'["a"]', InvalidFileError, "line 1 is not an object"),
        ("latin.txt", b"\xff", InvalidFileError, "not UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=message):
            read_documents(tmp_path / name)
    with pytest.raises(StorageError, match="cannot read"):
        read_documents(tmp_path / "missing.txt")


def test_documents_are_cut_into_sequences() -> None:
    encoder = Encoder(lambda text: [ord(char) for char in text], (1,), (), 2)
    documents = [Document(("abcdef",), ended=False), Document(("gh", "i"), ended=True), Document(("",), ended=False)]
    whole = [tokens.tolist() for tokens in cut(documents, encoder, 100, 100)]
    assert whole == [[1, *b"abcdef"], [1, *b"ghi", 2]]
    parts = [tokens.tolist() for tokens in cut(documents, encoder, 4, 100)]
    assert parts == [[1, *b"abc"], [*b"def"], [1, *b"ghi"]]  # a sequence of one token is left out
    assert len(cut(documents, encoder, 4, 5)) == 2
    grouped = batches([np.arange(n) for n in (3, 5, 3, 3, 5)], 7)
    assert [tokens.shape for tokens in grouped] == [(1, 5), (1, 5), (2, 3), (1, 3)]


def test_a_folder_is_loaded_and_calibrated(nano: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join((nano / "eval.jsonl").read_text("utf-8").splitlines()[:40]))
    seen: list[str] = []
    steps: list[tuple[int, int]] = []
    result = calibrate_folder(
        nano / "math",
        text,
        lambda name, _weight, _moments: seen.append(name),
        tokenizer=nano / "tokenizer.json",
        options=RunOptions(device="cpu"),
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert result.modules == seen
    assert steps[-1] == (result.blocks + 1, result.blocks + 1)
    with pytest.raises(UsageError, match=r"has no tokenizer; name a folder that has one, or a tokenizer\.json"):
        calibrate_folder(nano / "math", text, lambda *_: None)
    with pytest.raises(UsageError, match="not a tokenizer"):
        calibrate_folder(nano / "math", text, lambda *_: None, tokenizer=text)
    with pytest.raises(StorageError, match="no such folder"):
        calibrate_folder(tmp_path / "none", text, lambda *_: None)
    with pytest.raises(UsageError, match="transformers cannot load the model"):
        calibrate_folder(tmp_path, text, lambda *_: None, tokenizer=nano / "tokenizer.json")
    (tmp_path / "short.txt").write_text("1 + 1")
    with pytest.raises(UsageError, match=r"has \d+ tokens where at least \d+ are needed"):
        calibrate_folder(nano / "math", tmp_path / "short.txt", lambda *_: None, tokenizer=nano / "tokenizer.json")


def test_a_folder_without_a_weight_is_refused(nano: Path, tmp_path: Path) -> None:
    model = new_model("llama")
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    write_lines(tmp_path / "t.jsonl", {"text": "a"})
    with pytest.raises(UsageError, match=r'the model\'s weight "model.layers.1.mlp.up_proj.weight" is not there'):
        calibrate_folder(tmp_path, tmp_path / "t.jsonl", lambda *_: None, tokenizer=nano / "tokenizer.json")


def test_a_missing_transformers_is_said(nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    write_lines(tmp_path / "t.jsonl", {"text": "a"})
    with pytest.raises(UsageError, match="calibration needs transformers"):
        calibrate_folder(tmp_path, tmp_path / "t.jsonl", lambda *_: None, tokenizer=nano / "tokenizer.json")


def test_encoders(nano: Path, tmp_path: Path) -> None:
    config = type("Config", (), {"bos_token_id": 0, "eos_token_id": [1, 5]})
    bare = load_encoder(nano / "tokenizer.json", config)
    assert (bare.before, bare.after, bare.end) == ((0,), (), 1)
    tokens = bare.document(Document(("2 + ", "2"), ended=True))
    assert tokens[0] == 0
    assert tokens[-1] == 1
    assert tokens[1:-1] == bare.encode("2 + ") + bare.encode("2")
    parsed = json.loads((nano / "tokenizer.json").read_text("utf-8"))
    parsed["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}'
    )
    folder = load_encoder(tmp_path, config)
    assert (folder.before, folder.after, folder.end) == ((0,), (), 1)
    assert folder.encode("12") == bare.encode("12")
