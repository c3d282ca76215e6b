"""Functions and operations of torch that ask for the form of a tensor, and not for its values."""

from __future__ import annotations

from typing import Any

# Functions of a tensor that do not depend on its values.
FORM_ONLY = frozenset(
    [
        "dtype",
        "device",
        "shape",
        "size",
        "dim",
        "ndim",
        "numel",
        "nelement",
        "element_size",
        "stride",
        "storage_offset",
        "layout",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "is_sparse",
        "is_quantized",
        "is_leaf",
        "is_inference",
        "requires_grad",
        "grad",
        "grad_fn",
        "data_ptr",
        "untyped_storage",
        "get_device",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "__len__",
        "__hash__",
        "__get__",
        "_version",
        "requires_grad_",
        "_is_view",
        "_base",
        "is_shared",
        "names",
    ]
)


# Operations of torch that make a tensor of another one's form.
NEW_TENSORS = frozenset(
    (
        *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
        *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"),
    )
)

# Functions that give the values of their first argument another form, which other arguments may lend.
FORMED = frozenset(("to", "type_as", "view_as", "expand_as", "reshape_as"))


def lends_form(name: str, place: int | str) -> bool:
    """Tell whether a function asks for no more than the form of an argument.

    Args:
        name: the function's.
        place: the argument's number, or its name.
    """
    if name in FORMED:
        return place != 0
    return name in FORM_ONLY or (name == "new_tensor" and place == 0)


def function_name(func: Any) -> str:
    """Return the name of a function of torch; a property's getter has the name of the property."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return str(name)
