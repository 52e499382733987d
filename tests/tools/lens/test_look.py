"""This module holds the lens against transformers, against itself in other steps, and against planted faults. It does
not know pages or argv.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from octavo.engine.errors import ConfigError, RequestError
from octavo.engine.llm import LLM
from octavo.engine.models.decoder import Decoder
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.tools.lens import Lens, Readings, lens_record, look
from octavo.kernels import use_backend
from octavo.kernels.activation import activation_triton

from ...checkpoints import EOS, make_model, make_prompts, make_tiny_llama, save_model
from ...models.test_families import MODELS
from ...smollm2 import load_reference

BOUND = 3e-5
"""Of a hidden state's length, at each position. Measured over all families: at most 6.9e-6."""
PATHS_BOUND = 1e-5
"""Between the torch and the interpreted kernels' hidden states. Measured: at most 9.1e-7."""
ROOMY: dict[str, Any] = {"block_size": 16, "kv_cache_tokens": 2048, "device": "cpu", "backend": "torch"}


@pytest.fixture(autouse=True)
def _restore_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> LLM:
    return LLM(str(tiny_folder), **ROOMY)


def greedily(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def decoder_of(llm: LLM) -> Decoder:
    decoder: Decoder = llm.engine.core.runner.model  # type: ignore[attr-defined]
    return decoder


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest |a - b| / |b| of hidden states [..., H]."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """At every layer and position, of prompts that run in chunks and of outputs that run token by token."""
    architecture, settings = MODELS[name]
    model = make_model(architecture, **settings)
    llm = LLM(str(save_model(tmp_path, model)), max_num_batched_tokens=16, **ROOMY)
    prompt = make_prompts([37], seed=2, vocab_size=97)[0]
    lens = look(llm, prompt, greedily(5))
    assert lens.token_ids[:37] == prompt
    assert len(lens.token_ids) == 42
    with torch.inference_mode():
        theirs = model(torch.tensor([lens.token_ids[:-1]]), output_hidden_states=True)
    expected = torch.stack([states[0] for states in theirs.hidden_states])
    assert lens.paths[0].hidden_states.shape == expected.shape
    assert apart(lens.paths[0].hidden_states, expected) <= BOUND
    # What the last layer says is what was generated.
    assert lens.paths[0].readings.top_ids[-1, 36:, 0].tolist() == lens.token_ids[37:]
    assert lens.answer_ids.tolist() == theirs.logits[0].argmax(-1).tolist()


@pytest.mark.parametrize("name", ["llama, biases, eps", "qwen3, tied, groups of 3", "gpt2"])
def test_readings_are_those_of_the_final_norm_and_the_head(name: str, tmp_path: Path) -> None:
    """Every figure again, in float64, from transformers' hidden states and modules."""
    architecture, settings = MODELS[name]
    model = make_model(architecture, **settings)
    lens = look(LLM(str(save_model(tmp_path, model)), **ROOMY), prompt := [5, 9, 2, 9], greedily(3), top=4)
    text = torch.tensor([lens.token_ids])
    body = model.transformer if architecture == "GPT2" else model.model
    norm = body.ln_f if architecture == "GPT2" else body.norm
    raw: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _module, arguments: raw.append(arguments[0][0]))
    with torch.inference_mode():
        states = [each[0] for each in model(text[:, :-1], output_hidden_states=True).hidden_states]
        model.double()
        says = [*(model.lm_head(norm(each.double())) for each in states[:-1]), model.lm_head(states[-1].double())]
    found = lens.paths[0].readings
    last = says[-1].log_softmax(-1)
    assert lens.answer_ids[: len(prompt) - 1].tolist() == last.argmax(-1)[: len(prompt) - 1].tolist()
    for layer, logits in enumerate(says):
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(4)
        assert found.top_ids[layer].tolist() == top.indices.tolist()
        close = {"rtol": 1e-3, "atol": 1e-6}
        np.testing.assert_allclose(found.top_probability[layer], top.values.exp(), **close)
        np.testing.assert_allclose(found.kl[layer], (last.exp() * (last - logprobs)).sum(-1), **close)
        for probability, rank, ids in (
            (found.answer_probability, found.answer_rank, torch.from_numpy(lens.answer_ids)),
            (found.next_probability, found.next_rank, text[0, 1:]),
        ):
            own = logprobs.gather(1, ids[:, None])
            np.testing.assert_allclose(probability[layer], own[:, 0].exp(), **close)
            assert rank[layer].tolist() == (logprobs >= own).sum(-1).tolist()
        # The last layer's own state, before the norm.
        state, before = raw[0] if layer == len(says) - 1 else states[layer], states[max(layer - 1, 0)]
        np.testing.assert_allclose(found.norm[layer], state.norm(dim=-1), rtol=1e-5)
        if layer:
            np.testing.assert_allclose(found.cosine[layer], torch.cosine_similarity(state, before), atol=1e-5)
    assert np.isnan(found.cosine[0]).all()


def same(one: Lens, other: Lens) -> None:
    assert one.token_ids == other.token_ids
    assert apart(other.paths[0].hidden_states, one.paths[0].hidden_states) <= BOUND
    assert np.array_equal(one.answer_ids, other.answer_ids)
    for name in ("kl", "top_probability"):
        found, expected = (getattr(each.paths[0].readings, name) for each in (other, one))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "way",
    [
        {"max_num_batched_tokens": 7},
        {"preempt_every": 3},
        {"max_num_batched_tokens": 16, "invariant": True},
        {"overlap": True, "graphs": True},
    ],
)
def test_any_steps_show_the_same(way: dict[str, Any], tiny: LLM, tiny_folder: Path) -> None:
    prompt, other = make_prompts([40], seed=7)[0], LLM(str(tiny_folder), **ROOMY, **way)
    whole = look(tiny, prompt, greedily(6))
    same(whole, look(other, prompt, greedily(6)))
    # Nothing is shown of the token that ended it, which may have been run before that was known.
    stops = greedily(6).replace(stop_token_ids=[whole.token_ids[42]])
    same(look(tiny, prompt, stops), look(other, prompt, stops))


def test_blocks_that_are_cached_are_seen_all_the_same(tiny: LLM) -> None:
    prompt = make_prompts([40], seed=8)[0]
    tiny.generate([prompt], greedily(4))
    first = look(tiny, prompt, greedily(4))
    same(first, look(tiny, prompt, greedily(4)))


def test_some_layers_and_the_last_positions(tiny: LLM) -> None:
    prompt = make_prompts([20], seed=9)[0]
    whole, part = look(tiny, prompt, greedily(3)), look(tiny, prompt, greedily(3), layers=[1], last=2, top=2)
    assert (whole.first_position, part.first_position) == (0, 18)
    assert (whole.layers, part.layers) == ((0, 1, 2), (1, 2))
    assert torch.equal(part.paths[0].hidden_states, whole.paths[0].hidden_states[:, 18:])
    for one, other in zip(_arrays(part), _arrays(whole), strict=True):
        expected = other[1:, 18:, :2] if other.ndim == 3 else other[1:, 18:]
        np.testing.assert_allclose(one, expected, rtol=1e-4)


def _arrays(lens: Lens) -> list[Any]:
    readings = lens.paths[0].readings
    return [getattr(readings, name) for name in Readings.__slots__]


def test_text_chat_and_sampled_outputs(tiny: LLM) -> None:
    drawn = SamplingParams(temperature=1.5, seed=5, max_tokens=12, ignore_eos=True)
    lens = look(tiny, "in the", drawn)
    assert lens.token_ids[: lens.num_prompt_tokens] == tiny.encode("in the")
    output = np.array(lens.token_ids[lens.num_prompt_tokens :])
    at = lens.num_prompt_tokens - 1
    assert np.array_equal(lens.answer_ids[at:], output)
    ranks = lens.paths[0].readings.answer_rank[-1, at:]
    assert ranks.max() > 1, "at this temperature something else than the likeliest is drawn"
    assert np.array_equal(lens.settled[at:] < 0, ranks > 1)


def test_settled_is_the_first_layer_of_the_last_stretch(tiny: LLM) -> None:
    lens = look(tiny, [1, 2, 3], greedily(1))
    top_ids = np.array([[4, 4, 5], [7, 4, 7], [4, 4, 7]])[:, :, None]
    path = lens.paths[0]
    readings = Readings(**{name: getattr(path.readings, name) for name in Readings.__slots__} | {"top_ids": top_ids})
    changed = {name: getattr(lens, name) for name in Lens.__slots__} | {
        "answer_ids": np.array([4, 4, 9]),
        "paths": (type(path)(path.backend, path.states, readings),),
    }
    assert Lens(**changed).settled.tolist() == [2, 0, -1]


def test_ids_without_a_token_are_never_candidates(tiny: LLM) -> None:
    """The tiny tokenizer has 261 ids, the logits 300."""
    lens = look(tiny, make_prompts([9], seed=3)[0], greedily(2), top=50)
    assert lens.paths[0].readings.top_ids.max() <= 260


def test_among_equals_the_lower_id_comes_first_as_in_sampling(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), **ROOMY)
    decoder_of(llm)._final_norm.weight.zero_()
    lens = look(llm, [7, 8], greedily(2), top=3)
    assert lens.token_ids == [7, 8, 0, 0]
    assert (lens.paths[0].readings.top_ids == [0, 1, 2]).all()
    assert lens.settled.tolist() == [0, 0, 0]


def test_both_paths_side_by_side(tiny: LLM, count: Callable[[int, int], int]) -> None:
    lens = look(tiny, make_prompts([count(9, 40)], seed=6)[0], greedily(3), both=True)
    torch_path, triton_path = lens.paths
    assert (torch_path.backend, triton_path.backend) == ("torch", "triton")
    assert lens.differences is not None
    assert lens.differences.shape == torch_path.readings.kl.shape
    assert lens.differences[0].max() == 0.0, "the embedding has no kernel"
    assert 0.0 < lens.differences.max() <= PATHS_BOUND
    assert np.array_equal(torch_path.readings.top_ids[:, :, 0], triton_path.readings.top_ids[:, :, 0])
    assert lens.why_alone == ""
    assert decoder_of(tiny).__class__ is Decoder, "the watch is gone"


def test_a_fault_in_a_kernel_shows_from_its_layer_on(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second path follows the first one's tokens, so that cells stay comparable, however wrong it is."""
    right, calls = activation_triton.gated_activation, []

    def wrong(x: torch.Tensor, kind: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return right(x, kind, **options) * (1.5 if len(calls) % 2 == 0 else 1.0)

    monkeypatch.setattr(activation_triton, "gated_activation", wrong)
    lens = look(tiny, make_prompts([6], seed=6)[0], greedily(3), both=True)
    assert lens.differences is not None
    assert (lens.differences[:2] <= PATHS_BOUND).all()
    assert (lens.differences[2] > 1e-2).all()
    assert lens.paths[1].hidden_states.shape == lens.paths[0].hidden_states.shape


def test_states_that_are_not_finite_are_told(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), **ROOMY)
    decoder_of(llm)._layers[1].mlp_norm.weight[0] = math.nan
    lens = look(llm, [1, 2, 3], greedily(4))
    assert lens.output.error is not None
    record = json.loads(json.dumps(lens_record(lens), allow_nan=False))
    readings = record["paths"][0]["readings"]
    assert record["error"] == lens.output.error
    assert [row[0] is None for row in readings["norm"]] == [False, False, True]
    assert record["settled"] == [None, None, None]


def test_what_cannot_be_looked_at_is_refused(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"layer 3 is not there; allowed: 0 \(the embedding\) to 2"):
        look(tiny, [1], layers=[3])
    with pytest.raises(ConfigError, match="top is 0; allowed: 1 to 50"):
        look(tiny, [1], top=0)
    with pytest.raises(ConfigError, match="last is 0; allowed"):
        look(tiny, [1], last=0)
    with pytest.raises(RequestError, match="n is 2; allowed: 1"):
        look(tiny, [1], SamplingParams(n=2))
    with pytest.raises(RequestError, match="allowed"):
        look(tiny, [])
    assert decoder_of(tiny).__class__ is Decoder, "the watch is gone after an error, too"
    request = tiny.add([1, 2], greedily(2))
    with pytest.raises(ConfigError, match="has other requests"):
        look(tiny, [1])
    tiny.abort(request)
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="both paths cannot be run: the Triton kernels need a GPU"):
        look(tiny, [1], both=True)
    assert look(tiny, [1], greedily(1)).why_alone.startswith("the Triton kernels need a GPU")


def test_labels(tiny: LLM) -> None:
    text = "a b\n\té</script>"
    lens = look(tiny, [*tiny.encode(text), EOS], greedily(1))
    record = lens_record(lens)
    labels = [record["tokens"][str(token_id)] for token_id in record["token_ids"][: record["num_prompt_tokens"]]]
    assert labels == ["a", "␣", "b", "↵", "⇥", "\\xc3", "\\xa9", *"</script>", "<eos>"]


def test_progress(tiny: LLM) -> None:
    said: list[tuple[str, int, int]] = []
    look(tiny, [1, 2, 3], greedily(2), on_progress=lambda *what: said.append(what))
    assert {what for what, _, _ in said} == {"run on torch", "read torch's layers"}
    assert said[-1] == ("read torch's layers", 12, 12)
    assert all(0 < done <= total for _, done, total in said)


def test_smollm2() -> None:
    """The bundled model against transformers: hidden states within 1e-4, and Paris."""
    llm = LLM("smollm2-135m", kv_cache_tokens=512)
    lens = look(llm, "The capital of France is", greedily(4))
    with torch.inference_mode():
        theirs = load_reference()(torch.tensor([lens.token_ids[:-1]]), output_hidden_states=True)
    expected = torch.stack([states[0] for states in theirs.hidden_states])
    assert apart(lens.paths[0].hidden_states, expected) <= 1e-4  # measured: 7.0e-6
    assert lens.paths[0].readings.top_ids[-1, 4:, 0].tolist() == lens.token_ids[5:]
    assert lens_record(lens)["tokens"][str(lens.token_ids[5])] == "␣Paris"
