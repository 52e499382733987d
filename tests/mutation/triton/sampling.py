# ruff: noqa: E501 (one line per bug)
"""This module holds bugs for the sampling kernels. It does not know what catches them."""

from __future__ import annotations

from typing import Final

from . import Patch

RANK: Final = ".sampling.rank_triton"
SAMPLE: Final = ".sampling.sample_triton"
EDIT: Final = ".sampling.edit_triton"
LOGPROBS: Final = ".sampling.logprobs_triton"

_TIE: Final = """(o_id ^ _MAX_ID).to(tl.int64)


@triton.jit
def ranked_id(b_rank):
    \"\"\"Return the id in a rank, int32.\"\"\"
    return ((b_rank & _MAX_ID) ^ _MAX_ID).to(tl.int32)"""
_CHOSEN_TEMPERATURE: Final = """temperature = tl.load(p_temperature + i_row)
        if (temperature > 0) & (failed == 0):"""
_SCANNED_TEMPERATURE: Final = """temperature = tl.load(p_temperature + i_row)
        if temperature > 0:"""
_CANDIDATE_MASS: Final = "_mass((ranked_value(candidate) - top) * inverse)"
_MASS_BEFORE: Final = "before.to(tl.float64) < top_p * total.to(tl.float64)"

PATCHES: Final = (
    Patch("tie_highest", "equal logits go to the highest id", RANK, _TIE, _TIE.replace(" ^ _MAX_ID", "")),
    Patch("negative_order", "negative logits rank in reverse", RANK, "return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)", "return b_bits"),
    Patch("nan_low", "NaN is loaded as 0", RANK, 'tl.where(b_x < float("inf"), b_x, float("inf"))', "tl.where(b_x == b_x, b_x, 0.0)"),
    Patch("best_of_equals", "of a tile's equal values the highest id is best", RANK, "tl.min(tl.where(b_x == top, o_id, _MAX_ID), 0)", "tl.max(tl.where(b_x == top, o_id, 0), 0)"),
    Patch("minus_zero", "-0 ranks below 0", RANK, "(b_x + 0.0).to(tl.int32", "b_x.to(tl.int32"),
    Patch("infinity_passes", "a row with +inf does not fail", RANK, ">= _INFINITY", "> _INFINITY"),
    Patch("padding_zero", "lanes past the vocabulary hold 0", RANK, 'mask=o_id < NUM_IDS, other=float("-inf"))', "mask=o_id < NUM_IDS, other=0.0)"),
    Patch("last_chunk_whole", "the last tile's mask is one id short", RANK, "mask=o_id < NUM_IDS, other", "mask=o_id < NUM_IDS - 1, other"),
    Patch("prefix_ignored", "every digit is counted over all logits", RANK, "m_equal = ((b_key ^ prefix) >> shift >> 8) == 0", "m_equal = o_id < NUM_IDS"),
    Patch("counts_of_last_tile", "digits are counted in the last tile only", RANK, "b_counts += tl.histogram", "b_counts = tl.histogram"),
    Patch("digit_off", "a digit that the k-th just reaches is passed over", RANK, "(wanted <= b_above + b_counts)", "(wanted < b_above + b_counts)"),
    Patch("digits_dropped", "equal leading digits pass for equal logits", RANK, "while (shift >= LAST_SHIFT)", "while (shift >= 16)"),
    Patch("bfloat16_digits", "bfloat16 is told apart by its exponent only", RANK, "torch.bfloat16: 16", "torch.bfloat16: 24"),
    Patch("tie_one_more", "one too many of the tied tokens is kept", RANK, "(b_nth == wanted)", "(b_nth == wanted + 1)"),
    Patch("tie_all", "all tied tokens are kept", RANK, "if num_equal != wanted:", "if (num_equal != wanted) & (wanted < 0):"),
    Patch("tie_per_tile", "tied tokens are counted anew in every tile", RANK, "b_nth = num_before + tl.cumsum", "b_nth = tl.cumsum"),
    Patch("seed_high_word", "the seed's high word is ignored", RANK, "(seed >> 32).to(tl.uint32)", "(seed >> 32).to(tl.uint32) * 0"),
    Patch("seed_row", "every row has the first row's seed", RANK, "tl.load(p_seed + i_row)", "tl.load(p_seed)"),
    Patch("no_choice", "the n choices of a seed are one", RANK, "tl.load(p_choice + i_row).to(tl.uint32)", "tl.load(p_choice + i_row).to(tl.uint32) * 0"),
    Patch("no_position", "the noise is the same at every position", RANK, "tl.load(p_position + i_row).to(tl.uint32)", "tl.load(p_position + i_row).to(tl.uint32) * 0"),
    Patch("hash_shift", "the hash mixes with another shift", RANK, "h = (h ^ (h >> 13)) * 0xC2B2AE35\n    h ^= h >> 16", "h = (h ^ (h >> 12)) * 0xC2B2AE35\n    h ^= h >> 16"),
    Patch("noise_of_lane", "the noise is by place in a tile, not by id", RANK, "o_id.to(tl.uint32) * 0x9E3779B1", "(o_id % 4096).to(tl.uint32) * 0x9E3779B1"),
    Patch("no_noise", "the most probable token always wins", RANK, " / -tl.log(uniform(key0, key1, o_id))", ""),
    Patch("no_log2e", "probabilities are powers of two", RANK, "tl.math.exp2(b_z * LOG2E) /", "tl.math.exp2(b_z) /"),
    Patch("greedy_chunk", "the last chunk of logits is left out", SAMPLE, "m_chunk = o_chunk < NUM_CHUNKS", "m_chunk = o_chunk < NUM_CHUNKS - (NUM_CHUNKS > 1)"),
    Patch("chunk_factor", "each chunk's scores count from its own maximum", SAMPLE, "ranked_value(b_score) * b_factor", "ranked_value(b_score)"),
    Patch("temperature_multiplies", "logits are multiplied by the temperature", SAMPLE, "tl.math.div_rn(1.0, temperature)", "temperature"),
    Patch("temperature_row", "chunks are scored at the first row's temperature", SAMPLE, _SCANNED_TEMPERATURE, _SCANNED_TEMPERATURE.replace(" + i_row", "")),
    Patch("filter_temperature_row", "filters are at the first row's temperature", SAMPLE, _CHOSEN_TEMPERATURE, _CHOSEN_TEMPERATURE.replace(" + i_row", "")),
    Patch("no_finite_logit", "a row of -inf alone does not fail", SAMPLE, ' | (top == float("-inf"))', ""),
    Patch("ban_hides_nan", "only changed logits are judged", SAMPLE, "if p_best_before is not None:", "if p_best_before is None and p_best is None:"),
    Patch("k_plus_one", "top_k keeps one too many", SAMPLE, "kth_rank(p_row, top_k,", "kth_rank(p_row, top_k + 1,"),
    Patch("k_minus_one", "top_k keeps one too few", SAMPLE, "kth_rank(p_row, top_k,", "kth_rank(p_row, tl.maximum(top_k - 1, 1),"),
    Patch("k_of_one", "a top_k of 1 is ignored", SAMPLE, "(top_k > 0) &", "(top_k > 1) &"),
    Patch("k_row", "every row has the first row's top_k", SAMPLE, "tl.load(p_top_k + i_row)", "tl.load(p_top_k)"),
    Patch("p_row", "every row has the first row's top_p", SAMPLE, "tl.load(p_top_p + i_row)", "tl.load(p_top_p)"),
    Patch("min_p_row", "every row has the first row's min_p", SAMPLE, "tl.load(p_log_min_p + i_row)", "tl.load(p_log_min_p)"),
    Patch("filtered_row", "filters read the first row's logits", SAMPLE, "p_row = p_logits + i_row * STRIDE", "p_row = p_logits"),
    Patch("p_one_less", "top_p keeps one too few", SAMPLE, _MASS_BEFORE, _MASS_BEFORE.replace("before.", f"(before + {_CANDIDATE_MASS}).")),
    Patch("p_one_more", "top_p keeps one too many", SAMPLE, _MASS_BEFORE, _MASS_BEFORE.replace("before.", f"(before - {_CANDIDATE_MASS}).")),
    Patch("p_reached", "top_p keeps a token that completes nothing", SAMPLE, _MASS_BEFORE, _MASS_BEFORE.replace("<", "<=")),
    Patch("p_ignored", "top_p keeps all tokens", SAMPLE, _MASS_BEFORE, "total >= before"),
    Patch("p_ties", "top_p keeps all that tie with the last", SAMPLE, "tl.where(b_rank > candidate, b_mass, 0)", "tl.where(b_x > ranked_value(candidate), b_mass, 0)"),
    Patch("p_before_k", "top_p counts mass that top_k has dropped", SAMPLE, "(b_rank >= bound) & (b_z >= log_min_p), _mass(b_z)", "b_z >= log_min_p, _mass(b_z)"),
    Patch("p_before_min_p", "top_p counts mass that min_p has dropped", SAMPLE, "(b_rank >= bound) & (b_z >= log_min_p), _mass(b_z)", "b_rank >= bound, _mass(b_z)"),
    Patch("mass_of_last_tile", "top_p takes the last tile for all", SAMPLE, "total += tl.sum", "total = tl.sum"),
    Patch("mass_log2e", "top_p counts powers of two", SAMPLE, "b_exp = tl.math.exp2(b_z * LOG2E)", "b_exp = tl.math.exp2(b_z)"),
    Patch("second_draw_tile", "the second draw is from the last tile", SAMPLE, "best = tl.maximum(best, best_rank(b_score, o_id))", "best = best_rank(b_score, o_id)"),
    Patch("second_draw_k", "the second draw ignores top_k", SAMPLE, "(b_rank > candidate) & (b_rank >= bound) &", "(b_rank > candidate) &"),
    Patch("second_draw_min_p", "the second draw ignores min_p", SAMPLE, "(b_rank >= bound) & (b_z >= log_min_p)\n", "(b_rank >= bound)\n"),
    Patch("first_draw_k", "the first draw is kept whatever top_k says", SAMPLE, "is_kept = (candidate >= bound) &", "is_kept ="),
    Patch("first_draw_min_p", "the first draw is kept whatever min_p says", SAMPLE, "is_kept = (candidate >= bound) & ((x - top) * inverse >= log_min_p)", "is_kept = candidate >= bound"),
    Patch("min_p_no_log", "min_p is compared with a logit", SAMPLE, "params.min_p.log()", "(params.min_p - 1)"),
    Patch("invalid_ids", "ids past the tokenizer's are sampled", SAMPLE, "min(params.num_valid_ids, vocab_size)", "vocab_size"),
    Patch("edits_original", "the caller's logits are changed", SAMPLE, "edit_logits(copy,", "edit_logits(x,"),
    Patch("ban_ignored", "banned tokens are sampled", EDIT, 'b_x = tl.full((BLOCK,), float("-inf"), tl.float32)\n', "b_x = tl.load(p_entry, mask=m_entry, other=0.0)\n"),
    Patch("bias_row", "a bias lands on the row before", EDIT, "b_rows = tl.load(p_rows + o_entry, mask=m_entry, other=0).to(tl.int64)", "b_rows = tl.maximum(tl.load(p_rows + o_entry, mask=m_entry, other=0).to(tl.int64) - 1, 0)"),
    Patch("bias_replaces", "a bias takes the logit's place", EDIT, "tl.load(p_entry, mask=m_entry, other=0.0) + tl.load(p_values", "tl.load(p_values"),
    Patch("entry_below_0", "an entry for an id below 0 changes the row before", EDIT, "m_entry &= (b_ids >= 0) & (b_ids < NUM_IDS)", "m_entry &= b_ids < NUM_IDS"),
    Patch("entry_past_the_end", "an entry past the vocabulary changes the row behind", EDIT, "m_entry &= (b_ids >= 0) & (b_ids < NUM_IDS)", "m_entry &= b_ids >= 0"),
    Patch("seen_below_0", "a seen id below 0 is penalised in the row before", EDIT, "m_seen &= (b_ids >= 0) & (b_ids < NUM_IDS)", "m_seen &= b_ids < NUM_IDS"),
    Patch("seen_past_the_end", "a seen id past the vocabulary is penalised in the row behind", EDIT, "m_seen &= (b_ids >= 0) & (b_ids < NUM_IDS)", "m_seen &= b_ids >= 0"),
    Patch("allowed_row", "allowed tokens are another row's", EDIT, "p_bitmask + i_entry * MASK_STRIDE", "p_bitmask"),
    Patch("allowed_inverted", "allowed tokens are forbidden", EDIT, "(o_id % 32)) & 1) == 0)", "(o_id % 32)) & 1) == 1)"),
    Patch("allowed_bits", "bits of a word are read from the other end", EDIT, ">> (o_id % 32)", ">> (31 - o_id % 32)"),
    Patch("penalty_row", "penalties land on the row before", EDIT, "p_x + tl.load(p_rows + i_entry).to(tl.int64) * STRIDE", "p_x + tl.maximum(tl.load(p_rows + i_entry).to(tl.int64) - 1, 0) * STRIDE"),
    Patch("penalty_state", "penalties are for the first row's tokens", EDIT, "tl.load(p_state_rows + i_entry)", "tl.load(p_state_rows)"),
    Patch("penalty_stale", "an entry past num_seen is read", EDIT, "m_seen = o_seen < num_seen", "m_seen = o_seen <= num_seen"),
    Patch("repetition_sign", "repetition divides negative logits too", EDIT, "b_x * repetition)", "tl.math.div_rn(b_x, repetition))"),
    Patch("repetition_row", "every row has the first row's repetition", EDIT, "p_repetition + i_entry", "p_repetition"),
    Patch("presence_prompt", "presence counts the prompt", EDIT, "tl.where(b_counts > 0,", "tl.where(b_counts >= 0,"),
    Patch("presence_row", "every row has the first row's presence", EDIT, "p_presence + i_entry", "p_presence"),
    Patch("frequency_once", "frequency counts once", EDIT, "* b_counts.to(tl.float32)", "* tl.minimum(b_counts, 1).to(tl.float32)"),
    Patch("frequency_row", "every row has the first row's frequency", EDIT, "p_frequency + i_entry", "p_frequency"),
    Patch("sum_log2e", "mass is a sum of powers of two", LOGPROBS, "tl.math.exp2((b_x - top) * LOG2E)", "tl.math.exp2(b_x - top)"),
    Patch("tail_lost", "the long tail's mass is rounded away", LOGPROBS, "(b_exp * 2.0**50).to(tl.int64)", "(b_exp * 2.0**35).to(tl.int64) * 32768"),
    Patch("sum_chunk_factor", "each chunk's mass counts from its own maximum", LOGPROBS, "tl.math.exp2((ranked_value(b_best) - top) * LOG2E)", "1.0"),
    Patch("rank_of_ties", "tied tokens do not count in a rank", LOGPROBS, "(b_x >= chosen)", "(b_x > chosen)"),
    Patch("rank_padding", "lanes past the vocabulary count in a rank", LOGPROBS, "m_before = (b_x >= chosen) & (o_id < NUM_IDS)", "m_before = b_x >= chosen"),
    Patch("chosen_row", "every row has the first row's token", LOGPROBS, "tl.load(p_token_ids + i_row)", "tl.load(p_token_ids)"),
    Patch("top_id_plus_one", "top tokens are named by the id after theirs", LOGPROBS, "o_place, b_rank, mask=m_top)", "o_place, b_rank - 1, mask=m_top)"),
    Patch("top_row", "top tokens are the first row's", LOGPROBS, "p_row = p_logits + i_row * STRIDE\n        bound", "p_row = p_logits\n        bound"),
)  # fmt: skip
