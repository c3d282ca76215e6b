"""Every line of "Which adapters work" is a test: this list says which, and that it is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "adapters.md"

# By the beginning of the situation: the file and the test, with the case in brackets where there are cases.
LINES = {
    "plain LoRA;": "test_lora_peft.py::patterns",
    "a pattern of plain characters": "test_patterns.py::test_plain_keys_are_looked_up",
    "a pattern that can be matched": "test_patterns.py::test_what_is_refused",
    "more vectors than": "test_lora_peft.py::more vectors than columns",
    "LoRA on GPT-2's": "test_lora_peft.py::transposed squares",
    "LoRA on an embedding": "test_lora_peft.py::embeddings",
    "DoRA (`use_dora`)": "test_lora_peft_kinds.py::dora of transposed modules",
    "`lora_bias`": "test_import_lora_kinds.py::test_a_bias_of_b",
    "`trainable_token_indices`": "test_import_lora_kinds.py::test_trained_rows",
    "`target_parameters`: experts that the base stores as one": "test_lora_peft_kinds.py::transposed experts",
    "`target_parameters`: experts that the base stores one by": "test_lora_peft_kinds.py::experts by older names",
    "`target_parameters`: a router": "test_lora_peft_kinds.py::routers",
    "LoRA on a convolution": "test_import_lora_kinds.py::test_a_convolution_is_stored_whole",
    "LoRA on `torch.nn": "test_import_lora_kinds.py::test_attention_whose_weights_lie_together",
    "LoRA on a module whose weights": "test_lora_families.py::test_a_weight_that_is_read_without_a_call",
    "`modules_to_save`, `bias`": "test_import_lora.py::test_whole_tensors",
    "`modules_to_save` names": "test_import_lora.py::a saved module that is not there",
    "a vocabulary that was resized": "test_import_lora_kinds.py::test_a_larger_vocabulary",
    "a head with other rows": "test_import_lora.py::a head with other rows",
    "the base ties its head": "test_import_lora_kinds.py::test_an_embedding_that_the_base_ties",
    "the same, and both": "test_lora_peft_kinds.py::saved ends, kept tied",
    "a tie of more than two": "test_lora_peft_kinds.py::test_a_tie_of_more_than_two_is_refused",
    "names with `_orig_mod.`": "test_import_lora_kinds.py::test_names_that_wrappers_change",
    "names of transformers 5": "test_lora_peft_kinds.py::test_without_transformers_a_table_stands_in",
    "the adapter lies in a subfolder": "test_import_lora.py::test_wrong_folders",
    "`adapter_model.bin`": "test_import_lora.py::test_wrong_folders",
    "an empty tensor": "test_import_lora.py::what ZeRO-3 leaves",
    "several adapters": "test_import_lora.py::several adapters",
    "PiSSA": "test_import_lora.py::pissa",
    "`layer_replication`": "test_import_lora.py::replicated layers",
    "a setting that is not known": "test_import_lora.py::a key to come",
    "terms of `lowrank`": "test_export_lora.py::test_packed_vectors_become_factors",
    "a model that transformers renames": "test_lora_families.py::llava",
    "experts": "test_lora_families.py::mixtral",
    "a parameter that is no linear": "test_export_lora.py::test_a_parameter_that_is_no_weight_is_a_target_itself",
    "a module whose weights": "test_lora_families.py::test_a_weight_that_is_read_without_a_call",
    "a table of positions": "test_lora_families.py::deberta",
    "a tensor that the delta stores whole": "test_export_lora.py::test_whole_tensors_come_back",
    "the base ties an embedding": "test_lora_families.py::llama-tied",
    "the same, and the model": "test_lora_families.py::test_a_model_that_asks_for_its_ties_is_refused",
    "a head that the fine-tune unties": "test_lora_peft_kinds.py::the head of a tied base",
    "a tensor of a module": "test_export_lora.py::test_a_module_kept_whole_takes_the_rest_from_the_base",
    "a parameter of no module": "test_lora_families.py::test_a_parameter_of_no_module_is_refused",
    "a tensor for which": "test_lora_families.py::test_a_tensor_without_a_place_is_refused",
    "a vocabulary that grew": "test_export_lora.py::test_shapes_and_names_that_no_module_has",
    "terms of another kind": "test_export_lora.py::test_deltas_that_are_no_adapters",
    "how large": "test_export_lora.py::test_a_plan_writes_nothing",
}


def situations() -> list[str]:
    rows = re.findall(r"^\| (.+?) \| .+ \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    return [row for row in rows if row != "situation"]


def test_every_line_is_known() -> None:
    found = [next((start for start in LINES if line.startswith(start)), line) for line in situations()]
    assert found == list(LINES)


@pytest.mark.parametrize("line", LINES)
def test_the_tests_are_there(line: str) -> None:
    file, _, name = LINES[line].partition("::")
    text = (TESTS / file).read_text("utf-8")
    if file == "test_lora_families.py" and not name.startswith("test_"):
        text = (TESTS / "lora_models.py").read_text("utf-8")
    assert (f"def {name}(" if name.startswith("test_") else f'"{name}"') in text
