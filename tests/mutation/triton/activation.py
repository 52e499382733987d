"""This module holds the bugs to plant in the activation kernel. It does not know what catches them."""

from __future__ import annotations

from typing import Final

from . import Patch

_ACTIVATION: Final = ".activation.activation_triton"

PATCHES: Final = (
    Patch(
        "up_for_gate",
        "the second half is taken for the gate",
        _ACTIVATION,
        "b_gate = tl.load(p_x, mask",
        "b_gate = tl.load(p_x + SIZE * GATED, mask",
    ),
    Patch(
        "gate_for_up",
        "the gate is taken for the second half",
        _ACTIVATION,
        "tl.load(p_x + SIZE, mask",
        "tl.load(p_x, mask",
    ),
    Patch(
        "padded_half",
        "the second half is looked for a power of two on",
        _ACTIVATION,
        "tl.load(p_x + SIZE, mask",
        "tl.load(p_x + BLOCK, mask",
    ),
    Patch(
        "no_log2e",
        "sigmoid takes powers of two for powers of e",
        _ACTIVATION,
        "tl.math.exp2(b_gate * _MINUS_LOG2E)",
        "tl.math.exp2(-b_gate)",
    ),
    Patch(
        "quick_gelu",
        "gelu_tanh is x · sigmoid(1.702 x)",
        _ACTIVATION,
        "tl.math.exp2(b_cubic * _MINUS_TWO_LOG2E_ROOT)",
        "tl.math.exp2(b_gate * 1.702 * _MINUS_LOG2E)",
    ),
    Patch(
        "no_cube",
        "gelu_tanh leaves out the cubic term",
        _ACTIVATION,
        "b_cubic = b_gate + 0.044715 * b_gate * b_gate * b_gate",
        "b_cubic = b_gate",
    ),
    Patch("tanh_for_exact", "gelu is its tanh approximation", _ACTIVATION, 'if KIND == "gelu":', 'if KIND == "exact":'),
    Patch(
        "erf_of_x",
        "gelu's argument is not divided by the root of 2",
        _ACTIVATION,
        "tl.math.erf(b_gate * _ROOT_HALF)",
        "tl.math.erf(b_gate)",
    ),
    Patch(
        "narrow",
        "the gate's product with up is of numbers already rounded",
        _ACTIVATION,
        "b_out *= tl.load",
        "b_out = b_out.to(x.dtype.element_ty).to(tl.float32) * tl.load",
    ),
    Patch(
        "first_part_repeated",
        "every program handles the first part of its row",
        _ACTIVATION,
        "tl.program_id(1) * BLOCK + ",
        "",
    ),
    Patch(
        "tail_unmasked", "a row's store runs into the next", _ACTIVATION, "m_dim = o_dim < SIZE", "m_dim = o_dim >= 0"
    ),
    Patch(
        "row_overflow", "a row is counted in 32 bits", _ACTIVATION, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"
    ),
    Patch(
        "rows_side_by_side",
        "rows are taken to lie side by side",
        _ACTIVATION,
        "X_STRIDE=rows.stride(0)",
        "X_STRIDE=rows.shape[1]",
    ),
)
