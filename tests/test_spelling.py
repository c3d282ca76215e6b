"""A method's one spelling, and its options: what is said is read back, and nothing given is without effect."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafmt.errors import UsageError
from deltafmt.methods import DARE, GPTQ, METHODS, RTN, SVD, BitDelta, DeltaCoMe, DeltaDQ, Magnitude, Method, parse
from deltafmt.methods.base import DeltaRows
from deltafmt.methods.declare import Option, options_of

# Values of the options that are neither a choice nor a switch.
POOL = {
    "nm": ("1:8", "4:16", "2:2", "3:7", "5:64", "1:200"),
    "bits": tuple("12345678"),
    "head_bits": ("1", "3", "8"),
    "share": ("1", "2", "4", "8"),
    "scale_group": ("0", "4", "64", "128"),
    "head_scale_group": ("0", "16", "128"),
    "rank": ("1", "4", "8"),
    "bits_per_weight": ("0.5", "1", "2", "3.25"),
    "energy": ("0.25", "0.5", "1"),
    "density": ("0.1", "0.5", "1"),
    "drop": ("0", "0.5", "0.75"),
    "gain": ("0.5", "1", "1.5", "2"),
    "parts": ("1", "2", "8"),
    "bands": ("2@8+32@3+rest@2", "1@8+rest@1", "3@4+2@2", "8@1", "rest@2"),
    "damping": ("0", "0.01", "0.5"),
    "refits": ("0", "1", "3"),
}
KEYS = [(name, key) for name, method in METHODS.items() for key in options_of(method)]


def pool(key: str, each: Option) -> tuple[str, ...]:
    return each.choices or (("yes", "no") if each.is_switch else POOL[key])


def spelled(name: str, pairs: dict[str, str]) -> str:
    return f"{name}:{','.join(f'{key}={value}' for key, value in pairs.items())}" if pairs else name


@st.composite
def pairs_of(draw: st.DrawFn, name: str) -> dict[str, str]:
    """Give options of a method that it accepts together."""
    found: dict[str, str] = {}
    options = options_of(METHODS[name])
    for key in draw(st.permutations(list(options))):
        if draw(st.booleans()):
            tried = found | {key: draw(st.sampled_from(pool(key, options[key])))}
            try:
                parse(spelled(name, tried))
            except UsageError:
                continue
            found = tried
    return found


@given(st.data())
def test_what_a_method_says_of_itself_is_read_as_the_same_method(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(METHODS)))
    pairs = data.draw(pairs_of(name))
    method = parse(spelled(name, pairs))
    again = parse(method.spelling())
    assert again == method
    assert again.describe() == method.describe()
    assert again.spelling() == method.spelling()
    said = dict(pair.split("=") for pair in method.spelling().partition(":")[2].split(",") if pair)
    options = options_of(type(method))
    defaults = {key: None if each.default[0] is None else each.write(each.default) for key, each in options.items()}
    assert set(said) <= set(pairs)
    assert not [key for key, value in said.items() if value == defaults[key]]
    assert [key for key in defaults if key in said] == list(said)


@pytest.mark.parametrize(("name", "key"), KEYS)
@settings(max_examples=20)
@given(data=st.data())
def test_an_option_given_changes_what_the_method_says_or_is_refused(name: str, key: str, data: st.DataObject) -> None:
    each = options_of(METHODS[name])[key]
    pairs = data.draw(pairs_of(name))
    pairs.pop(key, None)
    said: dict[str, str] = {}
    for value in pool(key, each):
        try:
            method = parse(spelled(name, pairs | {key: value}))
        except UsageError:
            continue
        assert method.describe() not in said.values(), (said, value)
        said[value] = method.describe()
    try:
        plain = parse(spelled(name, pairs)).describe()
    except UsageError:
        return  # the other options need this one
    # The default in force is the only value that changes nothing; where the default has a value, it is that.
    same = [value for value, described in said.items() if described == plain]
    if each.default[0] is not None:
        assert same in ([], [each.write(each.default)])


def rows_with_moments() -> DeltaRows:
    rng = np.random.default_rng(3)
    mixed = (rng.standard_normal((64, 12)) @ rng.standard_normal((12, 128))).astype(np.float32)
    delta = mixed + rng.standard_normal((64, 128)).astype(np.float32)
    inputs = rng.standard_normal((200, 128)) * rng.uniform(0.1, 3, 128)
    bits = delta.view(np.uint32)
    return DeltaRows(bits, "F32", np.zeros_like(bits), "F32", 0, "w", (inputs.T @ inputs).astype(np.float32))


def frozen(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if dataclasses.is_dataclass(value):
        return tuple(frozen(getattr(value, each.name)) for each in dataclasses.fields(value))
    return tuple(map(frozen, value)) if isinstance(value, tuple) else value


# Other options, without which an option has no effect.
BESIDE = {
    ("bitdelta", "scale_group"): "mean=group",
    ("dare", "scale"): "bits=3",
    ("dare", "scale_dtype"): "bits=3",
    ("delta-come", "search"): "bands=1@8+1@3+rest@2,bits_per_weight=0.6",
    ("magnitude", "index"): "nm=2:8",
    ("magnitude", "share"): "nm=2:8",
    ("magnitude", "scale"): "nm=2:8",
    ("magnitude", "scale_dtype"): "nm=2:8",
    ("deltadq-sq", "search"): "nm=2:4",
    ("residual", "grid"): "bits=4",
    ("svd", "grid"): "bits=3",
    ("svd", "scale"): "bits=3",
    ("svd", "scale_group"): "bits=3",
    ("svd", "scale_dtype"): "bits=3",
}
# The scale rule of signs is for matrices that no text reaches.
WITHOUT_MOMENTS = {("bitdelta", "scale")}


# A method that gives no terms has tests of its own.
@pytest.mark.parametrize(("name", "key"), [(name, key) for name, key in KEYS if not METHODS[name].exact])
def test_every_option_changes_what_is_stored(name: str, key: str) -> None:
    each = options_of(METHODS[name])[key]
    rows = rows_with_moments()
    if (name, key) in WITHOUT_MOMENTS:
        rows = dataclasses.replace(rows, hessian=None)
    stored = set()
    beside = [BESIDE[name, key]] if (name, key) in BESIDE else []
    for value in pool(key, each):
        try:
            method = parse(f"{name}:{','.join([*beside, f'{key}={value}'])}")
        except UsageError:
            continue
        stored.add((method.layouts(*rows.shape), frozen(method.compress(rows, 7))))
        if len(stored) > 1:
            return
    pytest.fail(f"{key} of {name} changes nothing")


REFUSED = {
    "bitdelta:scale_group=64": "scale_group needs mean=group",
    "bitdelta:mean=row,scale_group=128": "scale_group needs mean=group",
    "magnitude:density=0.1,share=8": "share needs nm",
    "magnitude:density=0.1,index=rank": "index needs nm",
    "magnitude:scale=mse": "scale needs bits or nm",
    "magnitude:scale_dtype=BF16": "scale_dtype needs bits or nm",
    "magnitude:bits=4,value_dtype=F32": "value_dtype needs values that are stored as they are",
    "magnitude:nm=2:4,value_dtype=BF16": "value_dtype needs values that are stored as they are",
    "magnitude:nm=4:4,rescale=yes": "rescale needs elements that are dropped",
    "magnitude:density=1,rescale=no": "rescale needs elements that are dropped",
    "dare:scale=mse": "scale needs bits: without bits, values are stored as they are",
    "dare:scale_dtype=F32": "scale_dtype needs bits",
    "dare:bits=4,value_dtype=F16": "value_dtype needs values that are stored as they are",
    "dare:drop=0,rescale=yes": "rescale needs drop above 0",
    "svd:rank=4,scale=mse": "scale needs bits",
    "svd:rank=4,grid=midrise": "grid needs bits",
    "svd:rank=4,scale_group=64": "scale_group needs bits",
    "svd:bits=4,value_dtype=BF16": "value_dtype needs values that are stored as they are",
    "svd:bits=1,grid=asymmetric": "grid asymmetric needs 2 bits or more",
    "delta-come:bands=8@1,grid=midrise": "grid needs a band of 2 bits or more",
    "delta-come:bands=rest@2,search=yes": "search needs two bands or more",
    "deltadq:nm=2:2,rescale=no": "rescale needs N below M",
    "residual:nm=8:8,rescale=yes": "rescale needs N below M",
    "deltadq-sq:nm=4:4,rescale=no": "rescale needs N below M",
    "deltadq-sq:nm=1:200,search=no": "search needs an M that can be doubled or halved",
}


@pytest.mark.parametrize("text", REFUSED)
def test_an_option_without_effect_says_what_it_needs(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(text)
    assert REFUSED[text] in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BitDelta(scale_group=64), "scale_group needs mean=group"),
        (lambda: Magnitude(0.1, share=8), "share needs nm"),
        (lambda: DARE(scale="mse"), "scale needs bits"),
        (lambda: DARE(bits=4, value_dtype="F32"), "value_dtype needs values"),
        (lambda: SVD(rank=4, grid="midrise"), "grid needs bits"),
        (lambda: DeltaDQ(2, 2, rescale=False), "rescale needs N below M"),
        (lambda: DeltaCoMe("8@1", grid="midrise"), "grid needs a band of 2 bits or more"),
    ],
)
def test_constructors_refuse_options_without_effect(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


WRONG = {
    "": "unknown method ''; there are deltadq, residual",
    "help": "unknown method 'help'; there are deltadq",
    "rnt": "unknown method 'rnt', perhaps rtn",
    "whole": "unknown method 'whole'",
    "rtn:": "no option follows the colon; write rtn",
    "rtn:bits": "'bits' is not of the form key=value",
    "rtn:bits=3,": "'' is not of the form key=value",
    "rtn:bit=3": "method rtn has no option 'bit', perhaps bits; it has bits, grid",
    "rtn:bits=3,bits=3": "option 'bits' is given twice",
    "rtn:bits=three": "bits is a number, not 'three'",
    "rtn:bits=9": "k = 9",
    "rtn:scale=best": "scale rule 'best' is not one of minmax, mse, unbiased",
    "dare:drop=0.5 ": "drop is a number, not '0.5 '",
    "dare:drop=1_0": "drop is a number",
    "deltadq:nm=16": "'16' is not of the form N:M",
    "deltadq:rescale=maybe": "rescale is yes or no, not 'maybe'",
    "sparsegpt:index=seeded": "index 'seeded' cannot hold positions",
    "gptq:damping=-1": "damping -1.0 is not a number from 0 up",
    "rtn,bits=3": "write rtn:bits=3",
    "method=rtn,bits=3": "write rtn:bits=3",
    "method=rtn": "write rtn",
    "bits=3": "no method is named; write NAME:bits=3",
    "nm=2:16,bits=3": "no method is named; write NAME:nm=2:16,bits=3",
    "rtn:method=rtn": "a method is spelled NAME:key=value",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_spelling_names_the_part_and_what_is_possible(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(text)
    assert WRONG[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_values_may_hold_colons() -> None:
    assert parse("deltadq:nm=2:16,bits=2") == DeltaDQ(2, 16, 2)
    assert parse("nm=2:16", like=DeltaDQ(bits=2)) == DeltaDQ(2, 16, 2)
    assert parse("deltadq") == DeltaDQ()


def test_pairs_alone_change_another_method() -> None:
    like = DeltaDQ(2, 16, 2, scale="mse")
    assert parse("bits=3", like) == DeltaDQ(2, 16, 3, scale="mse")
    assert parse("deltadq:bits=3", like) == DeltaDQ(bits=3)
    assert parse("rtn:bits=3", like) == RTN(3)
    with pytest.raises(UsageError, match=r"^'bits' is an option of deltadq; write bits=VALUE$"):
        parse("bits", like)


@pytest.mark.parametrize(
    ("text", "like", "expected"),
    [
        ("mean=row", BitDelta("group", 64), BitDelta("row")),
        ("energy=0.5", SVD(rank=4, bits=3, scale="mse"), SVD(energy=0.5, bits=3, scale="mse")),
        ("density=0.2", Magnitude(n=2, m=8, share=4, index="rank"), Magnitude(0.2)),
        ("nm=2:2", DeltaDQ(rescale=False), DeltaDQ(2, 2)),
        ("bands=8@1", DeltaCoMe(grid="midrise", scale="mse"), DeltaCoMe("8@1", scale="mse")),
    ],
)
def test_options_that_lose_their_effect_are_forgotten(text: str, like: Method, expected: Method) -> None:
    assert parse(text, like) == expected


def test_options_stand_once() -> None:
    """No method states an option that a group of options has, but for another default or other words."""
    for method in METHODS.values():
        own = inspect.get_annotations(method)
        inherited = [base for base in method.__mro__[1:] if dataclasses.is_dataclass(base)]
        for name in own:
            for base in inherited:
                fields = {each.name: each for each in dataclasses.fields(base)}
                if name in fields and fields[name].metadata:
                    mine = next(each for each in dataclasses.fields(method) if each.name == name)
                    assert (mine.default, mine.metadata) != (fields[name].default, fields[name].metadata), name


def test_every_method_explains_itself() -> None:
    for name, method in METHODS.items():
        assert name == method.name
        assert parse(name) == method()
        assert isinstance(parse(method.example), method)
        assert parse(method.example).spelling() == method.example
        assert all((method.summary, method.details, method.paper, method.stores))
        assert method().describe().startswith(name)
        assert set(method.needs) <= set(options_of(method))
        for each in options_of(method).values():
            assert each.help
            assert each.possible
            assert each.default_text
    assert GPTQ(2).nearest == RTN(2)
