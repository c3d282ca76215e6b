"""What operations of torch do to the owners of their inputs; an operation without a rule here loses them."""

from __future__ import annotations

from typing import Final

from deltafmt.runtime.follow_indices import (
    copied_rule,
    gathered_rule,
    index_rule,
    masked_scatter_rule,
    put_rule,
    sorted_rule,
    summed_rule,
    taken_rule,
    unfilled_rule,
    written_rule,
)
from deltafmt.runtime.follow_moves import (
    cat_rule,
    moved_rule,
    over_dim_rule,
    pairs_rule,
    pointwise,
    reduced_rule,
    same_rule,
    stack_rule,
    view_rule,
)
from deltafmt.runtime.follow_products import (
    attention_rule,
    convolution_rule,
    embedding_rule,
    grouped_rule,
    linear_rule,
    product_rule,
    solved_rule,
)
from deltafmt.runtime.follow_seen import Rule

RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"), view_rule),
    **dict.fromkeys(
        (
            *("t", "transpose", "permute", "unsqueeze", "squeeze", "select", "slice", "split", "split_with_sizes"),
            *("chunk", "unbind", "narrow", "expand", "unfold", "repeat", "flip", "roll", "movedim", "tril", "triu"),
            *("diagonal", "rot90", "tile"),
        ),
        moved_rule,
    ),
    **dict.fromkeys(
        (
            *("_to_copy", "clone", "detach", "alias", "lift_fresh", "lift", "contiguous", "native_dropout", "to"),
            *("native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"),
            *("_fused_rms_norm", "rms_norm", "layer_norm", "max_pool2d_with_indices", "avg_pool2d", "constant_pad_nd"),
            *("_adaptive_avg_pool2d", "mean_pool", "upsample_bilinear2d", "upsample_bicubic2d", "avg_pool1d", "glu"),
            *("upsample_nearest2d", "upsample_nearest1d", "_conj", "nan_to_num"),
            *("_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_fft_r2c", "_fft_c2r", "_fft_c2c"),
            *("all_reduce", "wait_tensor", "_wrap_tensor_autograd"),  # of several processes
        ),
        same_rule,
    ),
    **dict.fromkeys(
        ("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "cumprod", "cummax"),
        over_dim_rule,
    ),
    **dict.fromkeys(
        (
            *("sum", "mean", "amax", "amin", "argmax", "argmin", "any", "all", "var", "std", "prod", "var_mean", "max"),
            *("min", "logsumexp", "linalg_vector_norm", "norm", "std_mean"),
        ),
        reduced_rule,
    ),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv"), product_rule),
    **dict.fromkeys(
        (
            "scaled_dot_product_attention",
            *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
            *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
            *("_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable"),
        ),
        attention_rule,
    ),
    **dict.fromkeys(("gather", "index_select"), taken_rule),
    **dict.fromkeys(("sort", "topk"), sorted_rule),
    **dict.fromkeys(("index_add", "index_copy"), written_rule),
    **dict.fromkeys(("scatter", "scatter_add"), unfilled_rule),
    "linalg_solve_triangular": solved_rule,
    **dict.fromkeys(("view_as_real", "view_as_complex"), pairs_rule),
    "linear": linear_rule,
    "all_gather_into_tensor": gathered_rule,
    "allreduce": summed_rule,
    "_grouped_mm": grouped_rule,
    "cat": cat_rule,
    "stack": stack_rule,
    "convolution": convolution_rule,
    "embedding": embedding_rule,
    "index": index_rule,
    "_unsafe_index": index_rule,
    "index_put": put_rule,
    "copy": copied_rule,
    "masked_scatter": masked_scatter_rule,
    **dict.fromkeys(("floor_divide", "polar", "complex"), pointwise),  # which torch does not call so
}
