"""This program starts an engine on a GPU that is not there, runs random requests through it and prints what was
compiled when.

Kernels are compiled to nothing and compute nothing, so what they should have written is zero: memory is handed out as
zeros. With --forget the warm-up does not know of one kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton.compiler
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.kernels import dispatch
from octavo.kernels.aot import warm
from octavo.kernels.aot.driver import fake_driver
from octavo.kernels.aot.keys import list_variants
from octavo.kernels.aot.targets import GPUS
from octavo.kernels.common.compiled import COMPILED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

TARGET = "sm_90"
VOCAB_SIZE = 301  # odd, so that rows of logits do not all start at a multiple of 16 bytes
MAX_MODEL_LEN = 1200  # room for splits, and for prefixes of a whole one that sequences share
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 2,
}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 40},
    "qwen3, a window in one layer": LLAMA
    | QWEN3
    | {"use_sliding_window": True, "sliding_window": 600, "max_window_layers": 1},
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "n_embd": 96,
        "n_layer": 2,
        "n_head": 6,
        "n_positions": MAX_MODEL_LEN,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "eos_token_id": 2,
    },
}


def write_tokenizer(folder: Path, num_ids: int) -> None:
    """Write a tokenizer of all bytes and as many special tokens as are missing."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<{index}>" for index in range(len(vocab), num_ids)])
    tokenizer.save(str(folder / "tokenizer.json"))


class Nothing:
    """What a kernel is compiled to: it only notes that it has been launched."""

    function = packed_metadata = None

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.is_loaded = False
        self.num_launches = 0

    def _init_handles(self) -> None:
        self.is_loaded = True

    def launch_metadata(self, *_: object) -> None: ...

    def run(self, *_: object) -> None:
        self.num_launches += 1


@contextlib.contextmanager
def compiling_nothing() -> Iterator[list[Nothing]]:
    """Yield what Triton is asked to compile."""
    compiled: list[Nothing] = []

    def compile_to_nothing(src: Any, **_: Any) -> Nothing:
        compiled.append(Nothing(src.fn.__name__))
        return compiled[-1]

    with (
        mock.patch.object(triton.compiler, "compile", compile_to_nothing),
        fake_driver(GPUS[TARGET]),
        dispatch.launching_nothing(),
    ):
        yield compiled


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Hand out zeros, and copy what comes from numpy: on a CPU `to(device)` would return a view of any alignment."""
    empty, from_numpy = torch.empty, torch.from_numpy

    def zeros(*shape: Any, **options: Any) -> Tensor:
        of_nothing = torch.device(options.get("device") or "cpu").type == "meta"
        return (empty if of_nothing else torch.zeros)(*shape, **options)

    with (
        mock.patch.object(torch, "empty", zeros),
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


def random_batch(rng: random.Random) -> Iterator[tuple[list[int], SamplingParams]]:
    """Yield requests, the first of which share more than a split of keys for some steps."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCAB_SIZE) for _ in range(count)]

    shared = tokens(600)
    for _ in range(3):
        yield shared + tokens(rng.randint(1, 20)), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for _ in range(rng.choice((1, 2, 7, 16, 20))):
        yield tokens(rng.randint(1, 180)), random_params(rng)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", choices=CONFIGS, default="llama")
    parser.add_argument("--num-valid-ids", type=int, help="that a tokenizer has; by default there is none")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--forget", default="", help="a kernel that the warm-up is not told of")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("octavo.kernels").addHandler(handler)

    def not_all(*args: Any) -> list[Any]:
        return [variant for variant in list_variants(*args) if variant.launch.kernel != arguments.forget]

    told: list[str] = []
    with tempfile.TemporaryDirectory() as folder, as_on_a_gpu(), compiling_nothing() as compiled:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIGS[arguments.config]))
        if arguments.num_valid_ids:
            write_tokenizer(Path(folder), arguments.num_valid_ids)
        with (
            mock.patch.object(warm, "list_variants", not_all),
            mock.patch("octavo.engine.startup.PROGRESS_PERIOD_S", 0.0),
        ):
            llm = LLM(
                folder, load_format="dummy", backend="triton", device="cpu", dtype="float32", block_size=16,
                kv_cache_tokens=4096, max_num_seqs=16, max_num_batched_tokens=200, on_phase=told.append,
                kv_cache_dtype=arguments.kv_cache_dtype, graphs=arguments.graphs,
            )  # fmt: skip
        num_warmed, num_loaded = len(compiled), sum(each.is_loaded for each in compiled)
        launched_before = sum(each.num_launches for each in compiled)
        answer_with_reference("sample", "log_softmax_top")
        for _ in range(arguments.batches):
            prompts, params = zip(*random_batch(rng), strict=True)
            llm.generate(prompts, params)
    launched = [each for each in compiled if each.num_launches]
    graphs = llm.engine.core.runner.graphs  # type: ignore[attr-defined]
    report = {
        "phase": next(phase.detail for phase in llm.engine.phases if phase.name == "compile the kernels"),
        "told": [text for text in told if text.startswith("compile")],
        "num_warmed": num_warmed,
        "num_loaded": num_loaded,
        "launched_before": launched_before,
        "is_warm": COMPILED.is_warm,
        "num_late": COMPILED.num_late,
        "late": [each.kernel for each in compiled[num_warmed:]],
        "never_launched": sorted({each.kernel for each in compiled} - {each.kernel for each in launched}),
        "num_launched": len(launched),
        "num_captured": 0 if graphs is None else graphs.counts["captured"],
        "warnings": warnings,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
