"""This module holds the bugs to plant in the normalisation kernels. It does not know what catches them."""

from __future__ import annotations

from typing import Final

from . import Patch

_NORM: Final = ".norm.norm_triton"

PATCHES: Final = (
    Patch(
        "padded_row",
        "the mean of squares is over the next power of two",
        _NORM,
        "tl.sum(b_x * b_x, axis=0), eps, HIDDEN_SIZE)",
        "tl.sum(b_x * b_x, axis=0), eps, BLOCK)",
    ),
    Patch(
        "padded_variance",
        "the variance is over the next power of two",
        _NORM,
        "tl.sum(b_centred * b_centred, axis=0), eps, HIDDEN_SIZE)",
        "tl.sum(b_centred * b_centred, axis=0), eps, BLOCK)",
    ),
    Patch(
        "padded_mean",
        "the mean is over the next power of two",
        _NORM,
        "tl.math.div_rn(tl.sum(b_x, axis=0), 1.0 * HIDDEN_SIZE)",
        "tl.math.div_rn(tl.sum(b_x, axis=0), 1.0 * BLOCK)",
    ),
    Patch(
        "padding_centred",
        "lanes past the row add the mean's square to the variance",
        _NORM,
        "tl.where(m_dim, b_x - mean, 0.0)",
        "b_x - mean",
    ),
    Patch(
        "unbiased",
        "the variance is divided by n - 1",
        _NORM,
        "axis=0), eps, HIDDEN_SIZE)\n    b_out = b_centred",
        "axis=0), eps, HIDDEN_SIZE - 1)\n    b_out = b_centred",
    ),
    Patch(
        "no_mean", "the mean is not subtracted", _NORM, "tl.where(m_dim, b_x - mean, 0.0)", "tl.where(m_dim, b_x, 0.0)"
    ),
    Patch(
        "no_bias",
        "the bias is left out",
        _NORM,
        "if bias is not None:\n        b_out",
        "if bias is None:\n        b_out",
    ),
    Patch(
        "eps_outside",
        "eps is added outside the root",
        _NORM,
        "tl.math.sqrt_rn(tl.math.div_rn(square_sum, 1.0 * HIDDEN_SIZE) + eps)",
        "(tl.math.sqrt_rn(tl.math.div_rn(square_sum, 1.0 * HIDDEN_SIZE)) + eps)",
    ),
    Patch(
        "no_root",
        "the row is divided by its mean square",
        _NORM,
        "tl.math.sqrt_rn(tl.math.div_rn(square_sum, 1.0 * HIDDEN_SIZE) + eps)",
        "(tl.math.div_rn(square_sum, 1.0 * HIDDEN_SIZE) + eps)",
    ),
    Patch("no_weight_offset", "weight_offset is left out", _NORM, "(b_weight + weight_offset)", "b_weight"),
    Patch(
        "residual_not_updated",
        "the residual keeps its value",
        _NORM,
        "tl.store(p_residual + o_dim, b_x, mask=m_dim)",
        "tl.store(p_residual + o_dim, b_residual, mask=m_dim)",
    ),
    Patch(
        "residual_ignored",
        "x is normalised without the residual",
        _NORM,
        "b_x.to(tl.float32) + b_residual.to(tl.float32)",
        "b_x.to(tl.float32)",
    ),
    Patch(
        "sum_not_rounded",
        "what is normalised is not what the residual holds",
        _NORM,
        "(b_x.to(tl.float32) + b_residual.to(tl.float32)).to(b_x.dtype)",
        "b_x.to(tl.float32) + b_residual.to(tl.float32)",
    ),
    Patch(
        "rounded_twice",
        "the row is rounded before it is weighted",
        _NORM,
        "b_x * inverse * (b_weight",
        "(b_x * inverse).to(x.dtype.element_ty).to(tl.float32) * (b_weight",
    ),
    Patch(
        "tail_unmasked",
        "a row's store runs into the next",
        _NORM,
        "offset)  # [BLOCK]\n    tl.store(out + i_row * OUT_STRIDE + o_dim, b_out.to(out.dtype.element_ty), mask=m_dim",
        "offset)\n    tl.store(out + i_row * OUT_STRIDE + o_dim, b_out.to(out.dtype.element_ty), mask=o_dim >= 0",
    ),
    Patch(
        "rows_side_by_side",
        "rows of x are taken to lie side by side",
        _NORM,
        "X_STRIDE=rows.stride(0)",
        "X_STRIDE=hidden_size",
    ),
    Patch(
        "row_overflow",
        "a row is counted in 32 bits",
        _NORM,
        "weight_offset)  # [BLOCK]\n    tl.store(out + i_row * OUT_STRIDE",
        "weight_offset)\n    tl.store(out + i_row.to(tl.int32) * OUT_STRIDE",
    ),
)
