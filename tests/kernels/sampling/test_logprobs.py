"""Log-probabilities: within 1e-6 of float64, exact in order, and the same bits in every batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from octavo.kernels.sampling.spec import SPECS
from octavo.kernels.spec import Case, generator
from torch import Tensor

from .. import calls

OPS = ("log_softmax_top",)

SPEC = next(spec for spec in SPECS if spec.name == "log_softmax_top")
CASES = [case for case in SPEC.cases if case.tier != "bench"]


def exact(logits: Tensor) -> np.ndarray:
    x = logits.double().numpy()
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(backend: str, case: Case, seeds: range) -> None:
    for seed in seeds:
        inputs = SPEC.make_inputs(case, generator(case.name, seed))
        logits, num_top, token_ids = inputs["logits"], inputs["num_top"], inputs["token_ids"].numpy()
        found = calls.log_softmax_top(**inputs)
        assert found.top_ids.shape == (len(logits), num_top)
        for at in range(len(logits)):
            x, logprobs = logits[at].double().numpy(), exact(logits[at])
            ranking = np.lexsort((np.arange(len(x)), -x))
            assert found.top_ids[at].tolist() == ranking[:num_top].tolist()
            assert np.abs(found.top_values[at].numpy() - logprobs[ranking[:num_top]]).max(initial=0) <= 1e-6
            assert abs(float(found.values[at]) - logprobs[token_ids[at]]) <= 1e-6
            assert int(found.ranks[at]) == (x >= x[token_ids[at]]).sum()


def test_a_row_has_the_same_bits_in_every_batch(backend: str) -> None:
    logits = torch.randn(13, 20000, generator=generator("batch")) * 4
    token_ids = torch.arange(13) * 100
    together = calls.log_softmax_top(logits, 6, token_ids)
    for at in range(13):
        alone = calls.log_softmax_top(logits[at : at + 1].clone(), 6, token_ids[at : at + 1])
        for one, many in zip(alone, together, strict=True):
            assert torch.equal(one[0], many[at])


def test_mass_of_a_long_tail_is_not_lost(backend: str) -> None:
    """262,143 tokens of e⁻²⁵ each hold 3.6e-6 of the mass between them."""
    logits = torch.full((1, 1 << 18), -25.0)
    logits[0, 77] = 0.0
    found = calls.log_softmax_top(logits, 1, torch.tensor([0]))
    assert abs(float(found.top_values) - exact(logits)[0, 77]) < 1e-9
    assert int(found.ranks) == 1 << 18


def test_ties_and_extremes(backend: str) -> None:
    logits = torch.tensor(
        [[1.0, 3.0, 3.0, 1.0, 3.0], [-0.0, 0.0, 1e30, 1e30, -1e30], [-torch.inf, 2.0, -torch.inf, 1.0, 1.0]]
    )
    found = calls.log_softmax_top(logits, 2, torch.tensor([4, 2, 0]))
    assert found.top_ids.tolist() == [[1, 2], [2, 3], [1, 3]]
    assert found.ranks.tolist() == [3, 2, 5]
    assert found.values[1] == pytest.approx(-np.log(2))
    assert found.values[2] == -torch.inf
    # Equal values on both sides of a tile's border, cut within them.
    many = (torch.randn(2, 9001, generator=generator("ties")) * 2).round()
    many[1, :4096] = -torch.inf
    found = calls.log_softmax_top(many, 700, torch.tensor([8999, 4096]))
    for at, logprobs in enumerate(exact(many)):
        ranking = np.lexsort((np.arange(9001), -logprobs))[:700]
        assert found.top_ids[at].tolist() == ranking.tolist()
        assert np.abs(found.top_values[at].numpy() - logprobs[ranking]).max() <= 1e-6
    assert found.ranks.tolist() == [int((row >= row[at]).sum()) for row, at in zip(many, (8999, 4096), strict=True)]


def test_views_of_wider_rows(backend: str) -> None:
    """Logits without the ids that a tokenizer lacks, and only some columns, side by side or not."""
    wide = torch.randn(3, 90, generator=generator("wide"))
    for view in (wide[:, :77], wide[1:, 5:82], wide[:, ::2], wide[:1].expand(4, -1)):
        for one, other in zip(calls.log_softmax_top(view, 9), calls.log_softmax_top(view.clone(), 9), strict=True):
            assert one is other is None or torch.equal(one, other)


def test_a_row_that_is_not_finite_reaches_no_other(backend: str) -> None:
    logits = torch.randn(3, 40, generator=generator("finite"))
    whole = calls.log_softmax_top(logits, 40, torch.tensor([1, 2, 3]))
    logits[1, 7] = torch.nan
    beside = calls.log_softmax_top(logits, 40, torch.tensor([1, 2, 3]))
    for one, other in zip(whole, beside, strict=True):
        assert torch.equal(one[::2], other[::2])
    assert beside.top_values[1].isnan().all()


def test_no_chosen_token(backend: str) -> None:
    found = calls.log_softmax_top(torch.zeros(3, 8), 2)
    assert found.values is None
    assert found.ranks is None
    assert found.top_ids.tolist() == [[0, 1]] * 3
