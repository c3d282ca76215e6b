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
        "type_as",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_tensor",
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


def function_name(func: Any) -> str:
    """Return the name of a function of torch; a property's getter has the name of the property."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return str(name)
