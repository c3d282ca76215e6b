"""In a batch of several deltas, every module knows whose rows it sees, whatever the sizes; or it is refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn

from deltafmt.errors import UsageError
from lora_models import _VISION, FAMILIES, new_family, shake
from row_cases import Mixed

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

# Rows and tokens: as many of one as of the other, a product that is the width of the model, a single token.
SIZES = ((2, 2), (3, 3), (2, 1), (2, 16), (4, 8), (3, 5))
NAMES = ("one", None, "two", "one")


def ids(rows: int, length: int) -> Any:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(rows * length))


def named(rows: int) -> list[str | None]:
    return ["one", "two"] if rows == 2 else list(NAMES[:rows])


def in_no_expert(name: str, _parameter: Any) -> bool:
    return "experts" not in name and "gate." not in name


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "distilbert", "t5", "bart", "mixtral", "electra"])
def test_text(tmp_path: Path, family: str) -> None:
    mixed = Mixed(tmp_path, new_family(family), in_no_expert)
    two = mixed.model.config.is_encoder_decoder
    for rows, length in SIZES:
        tokens = ids(rows, length)

        def call(model: Any, part: slice, tokens: Any = tokens) -> Any:
            return model(tokens[part], **({"decoder_input_ids": tokens[part].flip(1)} if two else {})).logits

        mixed.check(named(rows), call)
    assert mixed.steady


@pytest.mark.parametrize("family", ["whisper", "vit"])
def test_sounds_and_images(tmp_path: Path, family: str) -> None:
    mixed = Mixed(tmp_path, new_family(family))
    for rows, length in SIZES:
        generator = torch.Generator().manual_seed(rows)
        sounds, pixels = (
            torch.randn(rows, 8, 40, generator=generator),
            torch.randn(rows, 3, 16, 16, generator=generator),
        )
        tokens = ids(rows, length)

        def call(model: Any, part: slice, sounds: Any = sounds, pixels: Any = pixels, tokens: Any = tokens) -> Any:
            if FAMILIES[family].inputs == "images":
                return model(pixel_values=pixels[part]).logits
            return model(input_features=sounds[part], decoder_input_ids=tokens[part]).logits

        mixed.check(named(rows), call)
    assert mixed.steady


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_beams_reuse_what_the_encoder_gave(tmp_path: Path, family: str) -> None:
    mixed = Mixed(tmp_path, new_family(family))
    name = "input_features" if family == "whisper" else "input_ids"
    given = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(1)) if family == "whisper" else ids(3, 3)
    start = torch.ones(3, 1, dtype=torch.long)
    several = {"num_beams": 3, "num_return_sequences": 2}
    for options in ({}, {"num_beams": 3}, *([several] if family == "t5" else [])):

        def call(model: Any, part: slice, options: Any = options) -> Any:
            inputs = {name: given[part], "decoder_input_ids": start[part]}
            found = model.generate(**inputs, min_new_tokens=4, max_new_tokens=4, do_sample=False, **options)
            return found.view(-1, options.get("num_return_sequences", 1), found.shape[-1]).float()

        mixed.check(["one", None, "two"], call)


def clip() -> Any:
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 16, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    shake(model, 0, 0.1)
    return model


def test_both_towers(tmp_path: Path) -> None:
    mixed = Mixed(tmp_path, clip())
    for rows in (2, 3, 4):
        pixels, tokens = torch.randn(rows, 3, 16, 16), ids(rows, rows)
        for get, key, given in (
            ("get_image_features", "pixel_values", pixels),
            ("get_text_features", "input_ids", tokens),
        ):
            mixed.check(
                named(rows), lambda model, part, g=get, k=key, x=given: getattr(model, g)(**{k: x[part]}).pooler_output
            )
        for output in ("image_embeds", "text_embeds"):
            mixed.check(
                named(rows), lambda model, part, o=output, t=tokens, p=pixels: model(t[part], pixel_values=p[part])[o]
            )
    with mixed.model.delta(["one", "two"]), pytest.raises(UsageError, match=r"is given 2 rows of input_ids and 3 of p"):
        mixed.model(ids(2, 4), pixel_values=torch.randn(3, 3, 16, 16))


def test_images_belong_to_the_rows_whose_text_has_their_places(tmp_path: Path) -> None:
    mixed = Mixed(tmp_path, new_family("llava"))
    # What is found with an image a row holds for every other sharing out.
    for counts in ((1, 1), (2, 0), (0, 2), (3, 1), (2, 1, 0), (1, 1, 1), (0, 0, 3), (1, 0)):
        rows = [[1, *[95] * (4 * count), *range(5, 25)][:16] for count in counts]
        tokens, pixels = torch.tensor(rows), torch.randn(sum(counts), 3, 16, 16)

        def call(model: Any, part: slice, tokens: Any = tokens, pixels: Any = pixels, counts: Any = counts) -> Any:
            first = sum(counts[: part.start or 0])
            mine = pixels[first : first + sum(counts[part])]
            return model(tokens[part], pixel_values=mine if len(mine) else None).logits

        mixed.check(named(len(counts)), call)
    uneven = torch.tensor([[1, 95, 95, *range(5, 13)], [1, *[95] * 6, *range(5, 9)]])
    with mixed.model.delta(["one", "two"]), pytest.raises(UsageError, match=r"that do not fill the images' places in"):
        mixed.model(uneven, pixel_values=torch.randn(2, 3, 16, 16))


def qwen() -> Any:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1], "spatial_merge_size": 2}
    text = {**FAMILIES["llama"].options, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    options = {"image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **options)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    shake(model, 0, 0.1)
    return model


def test_packed_patches(tmp_path: Path) -> None:
    """Qwen packs the patches of all images into one row, and changes their order for its windows."""
    mixed = Mixed(tmp_path, qwen(), lambda name, _parameter: "patch_embed" not in name)
    grids = {1: (1, 4, 4), 2: (1, 4, 8), 3: (1, 8, 8)}
    for counts in (((1,), (1,)), ((2, 1), ()), ((), (3,)), ((1,), (3, 1))):
        rows, patches = [], []
        for row in counts:
            tokens = [1]
            for number in row:
                patches.append(math.prod(grids[number]))
                tokens += [93, *[95] * (patches[-1] // 4), 92]
            rows.append([*tokens, *range(5, 60)][:36])
        tokens = torch.tensor(rows)
        pixels = torch.randn(sum(patches), 3 * 2 * 4 * 4)
        sizes = torch.tensor([grids[number] for row in counts for number in row])

        def call(model: Any, part: slice, t: Any = tokens, p: Any = pixels, s: Any = sizes, c: Any = counts) -> Any:
            first, last = sum(map(len, c[: part.start or 0])), sum(map(len, c[: part.stop or len(c)]))
            begin, end = int(s[:first].prod(1).sum()), int(s[:last].prod(1).sum())
            images = {} if first == last else {"pixel_values": p[begin:end], "image_grid_thw": s[first:last]}
            kinds = (t[part] == 95).int()
            return model(t[part], mm_token_type_ids=kinds, **images).logits

        mixed.check(named(len(counts)), call)


class Odd(nn.Module):
    """Experts that see some of the tokens, tokens before rows, and rows that are shuffled and put back."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.first, self.second = nn.Embedding(96, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.turned, self.norm, self.pooled = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, input_ids: Any) -> Any:
        """Return one vector a row."""
        x = self.emb(input_ids)
        flat = x.reshape(-1, 8)
        chosen = (input_ids.reshape(-1) % 2).bool()
        out = torch.zeros_like(flat)
        out[chosen] = self.first(flat[chosen])
        places = (~chosen).nonzero().view(-1)
        out.index_add_(0, places, self.second(flat[places]))
        x = x + out.view(x.shape)
        x = self.norm(self.turned(x.transpose(0, 1))).transpose(0, 1)
        order = torch.arange(len(x) - 1, -1, -1)
        return self.pooled(x[order].mean(1))[order]


def test_modules_that_see_some_of_the_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mixed = Mixed(tmp_path, Odd())
    for rows, length in SIZES:
        tokens = ids(rows, length)
        mixed.check(named(rows), lambda model, part, tokens=tokens: model(tokens[part]))
        tokens = torch.arange(rows * length).view(rows, length) % 96  # each expert has as many tokens as the other
        mixed.check(named(rows), lambda model, part, tokens=tokens: model(tokens[part]))
    assert not mixed.steady


class Strange(nn.Module):
    """What can be done to rows that no delta can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc = nn.Embedding(96, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Any, how: str) -> Any:
        """Hand the layer rows that are not the batch's."""
        x = self.emb(input_ids)
        if how == "mixed":
            x = x + x.flip(0)
        elif how == "pooled":
            x = x.mean(0, keepdim=True).expand(len(x), -1, -1)
        elif how == "unknown":
            x = torch.linalg.qr(x)[0]
        return self.fc(x)


@pytest.mark.parametrize("how", ["mixed", "pooled", "unknown"])
def test_rows_that_cannot_be_told_are_refused_by_name(tmp_path: Path, how: str) -> None:
    torch.manual_seed(0)
    mixed = Mixed(tmp_path, Strange())
    tokens = ids(3, 8)
    for _ in range(2):
        with mixed.model.delta(["one", None, "two"]), pytest.raises(UsageError, match=r"^fc is given the shape \[3, 8"):
            mixed.model(tokens, how=how)
    with torch.no_grad(), mixed.model.delta("one"):
        assert torch.allclose(mixed.model(tokens, how=how), mixed.alone["one"](tokens, how=how), atol=1e-5)
    with mixed.model.delta(["one", None, "two"]), pytest.raises(UsageError, match=r"^fc is called outside of its mo"):
        mixed.model.fc(torch.randn(3, 8))


def test_what_depends_on_no_row_is_computed_for_each_delta(tmp_path: Path) -> None:
    """A table goes through a norm and a product of its own before it meets the rows, as relative positions do."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(4, 8), nn.LayerNorm(8)
            self.up, self.inner = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, x: Any) -> Any:
            table = self.inner(self.norm(self.table.weight))
            return self.up(x @ self.up(table).T @ table)

    torch.manual_seed(0)
    mixed = Mixed(tmp_path, Positions())
    x = torch.randn(3, 2, 8)
    hooks = {name: list(module._forward_hooks) for name, module in mixed.model.named_modules()}
    for _ in range(3):
        mixed.check(("one", None, "two"), lambda model, part: model(x[part]))
    assert mixed.steady
    assert hooks == {name: list(module._forward_hooks) for name, module in mixed.model.named_modules()}


def test_a_recurrent_state_has_rows(tmp_path: Path) -> None:
    """RWKV adds a state without a dimension of tokens to the tokens, so every row meets the states of all."""
    options = {"vocab_size": 96, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**options)).eval()
    shake(model, 3, 0.1)
    mixed = Mixed(tmp_path, model)
    with torch.no_grad(), mixed.model.delta(["one", None]):
        first = mixed.model(ids(2, 5), use_cache=True)
        with pytest.raises(UsageError, match=r"^rwkv.blocks.0.* is given the shape \[2, 2, 32\], which cannot be"):
            mixed.model(ids(2, 1), state=first.state, use_cache=True)


def test_an_argument_that_is_called_a_state_has_rows_in_rwkv_alone(tmp_path: Path) -> None:
    """In the states of other recurrent models, layers come first; as many layers as rows tell nothing."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.step, self.up = nn.Embedding(96, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, input_ids: Any, state: Any) -> Any:
            states = torch.stack(list(state))
            return self.up(self.table(input_ids) + self.step(states).sum(0)[:, None])

    torch.manual_seed(0)
    mixed = Mixed(tmp_path, Recurrent())
    state = torch.randn(2, 2, 8)
    for given in (state, list(state)):
        for _ in range(2):
            with (
                mixed.model.delta(["one", None]),
                pytest.raises(UsageError, match=r"^step is given the shape \[2, 2, 8"),
            ):
                mixed.model(ids(2, 4), state=given)
    with torch.no_grad(), mixed.model.delta("one"):
        assert torch.allclose(mixed.model(ids(2, 4), state=state), mixed.alone["one"](ids(2, 4), state), atol=1e-5)
