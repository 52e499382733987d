"""This program runs random requests through an engine on a GPU that is not there and prints which variants leave the
set that `keys` lists for its configuration.

Nothing is computed by the kernels, so what they should have written is zero: memory is handed out as zeros.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.kernels import dispatch
from octavo.kernels.aot.calls import Settings
from octavo.kernels.aot.driver import recording
from octavo.kernels.aot.keys import list_variants
from octavo.kernels.aot.targets import GPUS, Model
from torch import Tensor

TARGET = "sm_90"
VOCAB_SIZE = 301  # odd, so that rows of logits do not all start at a multiple of 16 bytes
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 2,
}
SIZES = Model(6, 2, 16, 64, 96, VOCAB_SIZE, dtype="float32")


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Hand out zeros, and copy what comes from numpy: on a CPU `to(device)` would return a view of any alignment."""
    from_numpy = torch.from_numpy
    with (
        mock.patch.object(torch, "empty", torch.zeros),
        mock.patch.object(torch, "empty_like", torch.zeros_like),
        mock.patch.object(Tensor, "new_empty", Tensor.new_zeros),
        mock.patch.object(torch, "from_numpy", lambda array: from_numpy(array).clone()),
    ):
        yield


def gather_in_bounds(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return torch.gather(x, dim, index.clamp(0, x.shape[dim] - 1))


def answer_with_reference(*ops: str) -> None:
    """Launch these ops' kernels, and return what the torch backend says: an engine acts on sampled tokens."""

    def answer(op: str, *args: Any, **kwargs: Any) -> Any:
        if "triton" in dispatch.OPS[op]:
            with mock.patch.object(Tensor, "gather", gather_in_bounds):
                dispatch.implementation(op, "triton")(*args, **kwargs)
        return dispatch.implementation(op, "torch")(*args, **kwargs)

    for op in ops:
        dispatch.active[op] = functools.partial(answer, op)


def random_params(rng: random.Random) -> SamplingParams:
    def maybe(value: Any, otherwise: Any) -> Any:
        return value if rng.random() < 0.3 else otherwise

    return SamplingParams(
        max_tokens=rng.randint(1, 12),
        temperature=rng.choice((0.0, 1.0)),
        seed=rng.randrange(1 << 30),
        top_k=maybe(20, 0),
        top_p=maybe(0.9, 1.0),
        min_p=maybe(0.05, 0.0),
        frequency_penalty=maybe(0.5, 0.0),
        logit_bias=maybe({5: 2.0}, None),
        allowed_token_ids=maybe(list(range(90)), None),
        bad_words_token_ids=maybe([[7], [8, 9]], ()),
        logprobs=maybe(rng.randint(0, 20), None),
        prompt_logprobs=maybe(rng.randint(0, 20), None),
        ignore_eos=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 200}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        with as_on_a_gpu(), recording(GPUS[TARGET]) as seen:
            llm = LLM(
                folder, load_format="dummy", backend="triton", device="cpu", dtype="float32", block_size=16,
                kv_cache_tokens=2048, **limits,
            )  # fmt: skip
            answer_with_reference("sample", "log_softmax_top")
            for _ in range(arguments.batches):
                count = rng.choice((1, 2, 7, 16, 20))
                prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 180))] for _ in range(count)]
                llm.generate(prompts, [random_params(rng) for _ in prompts])
    known = {variant.launch for variant in list_variants(SIZES, [Settings(16, max_model_len=256, **limits)], TARGET)}
    unknown = [f"{launch.kernel} {launch.signature} {launch.constants}" for launch in seen if launch not in known]
    print(json.dumps({"num_known": len(known), "num_launched": len(seen), "unknown": unknown}))


if __name__ == "__main__":
    main()
