"""This module holds bugs of reading quantised caches. It does not know which check finds which."""

from __future__ import annotations

from . import Patch

_TILE = ".attention.quantised_triton"
_DECODE = ".attention.decode_triton"
_PREFILL = ".attention.prefill_triton"

PATCHES: tuple[Patch, ...] = (
    Patch(
        "int8_off_by_one",
        "int8 numbers are one too small",
        _TILE,
        "b_even = _tile((b_words & 0x00FF00FF) ^ 0x64806480, b_pairs.shape, VALUES) - 1152.0",
        "b_even = _tile((b_words & 0x00FF00FF) ^ 0x64806480, b_pairs.shape, VALUES) - 1153.0",
    ),
    Patch(
        "int8_unsigned",
        "odd int8 elements are read without their sign",
        _TILE,
        "b_odd = _tile(((b_words >> 8) & 0x00FF00FF) ^ 0x64806480, b_pairs.shape, VALUES) - 1152.0",
        "b_odd = _tile(((b_words >> 8) & 0x00FF00FF) ^ 0x64006400, b_pairs.shape, VALUES) - 1024.0",
    ),
    Patch(
        "halves_swapped",
        "the odd elements are given for the even ones, and these for those, of int8",
        _TILE,
        "b_odd = _tile(((b_words >> 8) & 0x00FF00FF) ^ 0x64806480, b_pairs.shape, VALUES) - 1152.0",
        "b_even, b_odd = _tile(((b_words >> 8) & 0x00FF00FF) ^ 0x64806480, b_pairs.shape, VALUES) - 1152.0, b_even",
    ),
    Patch(
        "words_swapped",
        "the two pairs of a word change places",
        _TILE,
        "tl.join((b_words & 0xFFFF).to(tl.uint16), (b_words >> 16).to(tl.uint16))",
        "tl.join((b_words >> 16).to(tl.uint16), (b_words & 0xFFFF).to(tl.uint16))",
    ),
    Patch(
        "e4m3_sign_lost",
        "even e4m3 elements lose their sign",
        _TILE,
        "b_even = ((b_words & 0x00800080) << 8) | ((b_words & 0x007F007F) << 7)",
        "b_even = (b_words & 0x007F007F) << 7",
    ),
    Patch(
        "e4m3_mantissa_cut",
        "odd e4m3 elements lose their last bit",
        _TILE,
        "b_odd = (b_words & 0x80008000) | ((b_words & 0x7F007F00) >> 1)",
        "b_odd = (b_words & 0x80008000) | ((b_words & 0x7E007E00) >> 1)",
    ),
    Patch(
        "e4m3_neighbour_leaks",
        "an e4m3 element gets its neighbour's lowest bit",
        _TILE,
        "b_odd = (b_words & 0x80008000) | ((b_words & 0x7F007F00) >> 1)",
        "b_odd = (b_words & 0x80008000) | ((b_words & 0x7FFF7FFF) >> 1)",
    ),
    Patch(
        "e4m3_nan_is_a_number",
        "e4m3's NaN is read as 480",
        _TILE,
        "_E4M3_GAIN = tl.constexpr(36864.0)\n",
        "_E4M3_GAIN = tl.constexpr(34848.0)\n",
    ),
    Patch(
        "e4m3_two_roundings",
        "e4m3 results are multiplied with a rounded quotient",
        _TILE,
        "b_whole = tl.math.div_rn(b_whole, tl.full(b_whole.shape, _E4M3_STEPS, tl.float32))",
        "b_whole *= 1.0001 / _E4M3_STEPS",
    ),
    Patch(
        "infinite_key_hides",
        "a key that is no number is not seen by rows that are opposite to it",
        _TILE,
        "return b_scores + b_scores * 0.0",
        "return b_scores",
    ),
    Patch(
        "infinite_value",
        "a value that is no number gives infinity",
        _TILE,
        "return b_whole + b_whole * 0.0",
        "return b_whole",
    ),
    Patch(
        "key_scale_missing",
        "int8 scores are not multiplied with the keys' scales",
        _TILE,
        "b_scores *= b_q[2][:, None] * tl.load(k_scale + o_slot)[None, :]",
        "b_scores *= b_q[2][:, None]",
    ),
    Patch(
        "value_scale_missing",
        "int8 weights are not multiplied with the values' scales",
        _TILE,
        "b_weights *= tl.load(v_scale + o_slot)[None, :]",
        "b_weights *= 1.0",
    ),
    Patch(
        "key_scale_for_values",
        "e4m3 results get the keys' scale",
        _DECODE,
        "k_scale, v_scale = layer_scale(k_scale), layer_scale(v_scale)",
        "k_scale, v_scale = layer_scale(k_scale), layer_scale(k_scale)",
    ),
    Patch(
        "scale_of_head_0",
        "every KV head uses the first one's value scales",
        _DECODE,
        "v_scale += i_kv_head * BLOCK_SIZE",
        "v_scale += 0",
    ),
    Patch(
        "head_half_way",
        "values are read from the wrong KV head: the stride counts elements, not pairs",
        _DECODE,
        "p_values = p_v_cache + i_kv_head * (BLOCK_SIZE * ROW)",
        "p_values = p_v_cache + i_kv_head * (BLOCK_SIZE * ROW // 2)",
    ),
    Patch(
        "peak_not_rescaled",
        "what a row has attended to is not brought to the new unit",
        _TILE,
        "b_rescale *= b_peak * b_inverse",
        "b_rescale *= 1.0",
    ),
    Patch(
        "peak_forgotten",
        "int8 results stay in the row's unit",
        _TILE,
        "b_whole *= b_peak[:, None]",
        "b_whole *= 1.0",
    ),
    Patch(
        "weights_in_no_unit",
        "products of weights and scales are taken to float16 as they are",
        _TILE,
        "b_new_peak = tl.maximum(tl.maximum(b_peak * b_rescale, tl.max(b_weights, 1)), _LEAST_PEAK)",
        "b_new_peak = tl.maximum(b_peak * 0.0, 1.0)",
    ),
    Patch(
        "queries_out_of_range",
        "bfloat16 queries are taken to float16 as they are",
        _TILE,
        "b_exponent = tl.maximum(b_exponent, 15 << 23) - (14 << 23)",
        "b_exponent = b_exponent * 0 + (127 << 23)",
    ),
    Patch(
        "prefill_scales_swapped",
        "keys and values change their layer's scales",
        _PREFILL,
        "k_scale, v_scale = layer_scale(k_scale), layer_scale(v_scale)",
        "k_scale, v_scale = layer_scale(v_scale), layer_scale(k_scale)",
    ),
    Patch(
        "prefill_scale_of_head_0",
        "every KV head uses the first one's key scales",
        _PREFILL,
        "k_scale += i_kv_head * BLOCK_SIZE",
        "k_scale += 0",
    ),
)
