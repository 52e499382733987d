"""Throughput of the whole engine beside transformers' generate, interleaved in one run.

    python benchmarks/engine.py --json benchmarks/results/cpu/engine.json

Both generate exactly the same number of tokens for the same prompts with the same float32 weights, greedily; only time
inside `generate` counts. transformers runs padded batches (left padding, its own KV cache). A case is reported only if
both gave the same tokens for nearly all prompts; with keys and values in eight bits that is told and not asked for.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from octavo.engine import LLM, SamplingParams
from octavo.engine.loader import resolve_model
from workload import prompts as make_prompts

MODEL = "smollm2-135m"
MIN_AGREEMENT = 0.9
"""Least part of prompts with equal tokens: in padded batches transformers itself flips near-ties."""


def build_transformers(name: str) -> Any:
    """Return transformers' model with the same weights, each taken from its rows of octavo's parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = resolve_model(name)
    c = checkpoint.model_config
    tensors: dict[str, torch.Tensor] = {}
    checkpoint.load_weights(lambda name, shape: torch.empty(shape), tensors.__setitem__)
    assert c.rope is not None
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_q_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta},
        tie_word_embeddings=c.tie_embeddings,
    )
    model = LlamaForCausalLM(config).eval()
    state = {
        "model.embed_tokens.weight": tensors["embedding.weight"],
        "model.norm.weight": tensors["final_norm.weight"],
    }
    q, k = c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim
    for i in range(c.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        q_rows, k_rows, v_rows = tensors[ours + "qkv.weight"].split((q, k, k))
        gate, up = tensors[ours + "gate_up.weight"].chunk(2)
        state |= {
            theirs + "self_attn.q_proj.weight": q_rows,
            theirs + "self_attn.k_proj.weight": k_rows,
            theirs + "self_attn.v_proj.weight": v_rows,
            theirs + "self_attn.o_proj.weight": tensors[ours + "o.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": tensors[ours + "down.weight"],
            theirs + "input_layernorm.weight": tensors[ours + "attention_norm.weight"],
            theirs + "post_attention_layernorm.weight": tensors[ours + "mlp_norm.weight"],
        }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model


def run_transformers(model: Any, prompts: list[list[int]], num_tokens: int, batch: int) -> list[list[int]]:
    """Generate in padded batches, in the order given."""
    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in part])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part])
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=0,
            eos_token_id=None,
        )
        answers += out[:, width:].tolist()
    return answers


def run_octavo(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """Generate with continuous batching; what ran before leaves nothing in the prefix cache."""
    llm.engine.core.scheduler.reset_prefix_cache()
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def timed(name: str, function: Any, *args: Any) -> tuple[float, list[list[int]]]:
    """Run and time; a line on stderr says what is running, as a case takes up to a minute."""
    print(f"  {name} ...", end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    answers = function(*args)
    seconds = time.perf_counter() - start
    print(f" {seconds:.1f} s", file=sys.stderr, flush=True)
    return seconds, answers


def measure(batch: int, args: argparse.Namespace, reference: Any) -> dict[str, Any]:
    """Time one batch size, round by round, both engines in each."""
    llm = LLM(MODEL, max_num_seqs=batch, kv_cache_dtype=args.kv_cache_dtype)
    prompts = make_prompts(llm.tokenizer, args.prompts, spread=args.spread)
    greedy = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
    sampled = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, seed=1, max_tokens=args.tokens, ignore_eos=True)
    warm = prompts[:batch]
    run_octavo(llm, warm, greedy.replace(max_tokens=4))
    if reference is not None:
        run_transformers(reference, warm, 4, batch)
    seconds: dict[str, list[float]] = {"octavo": [], "octavo sampled": [], "transformers": []}
    agreement = 1.0
    for _ in range(args.rounds):
        ours, answers = timed("octavo", run_octavo, llm, prompts, greedy)
        seconds["octavo"].append(ours)
        if args.sampled:
            seconds["octavo sampled"].append(timed("octavo sampled", run_octavo, llm, prompts, sampled)[0])
        if reference is not None:
            theirs, expected = timed("transformers", run_transformers, reference, prompts, args.tokens, batch)
            seconds["transformers"].append(theirs)
            agreement = sum(a == b for a, b in zip(answers, expected, strict=True)) / len(prompts)
            if agreement < MIN_AGREEMENT and args.kv_cache_dtype == "auto":
                raise SystemExit(f"batch {batch}: only {agreement:.0%} of the prompts have equal tokens; not reported")
    total = args.prompts * args.tokens
    rates = {name: [total / each for each in runs] for name, runs in seconds.items() if runs}
    row: dict[str, Any] = {"batch": batch, "tokens_per_s": rates, "agreement": agreement}
    if reference is not None:
        pairs = zip(rates["octavo"], rates["transformers"], strict=True)
        row["ratio"] = statistics.median(ours / theirs for ours, theirs in pairs)
    if args.sampled:
        pairs = zip(rates["octavo sampled"], rates["octavo"], strict=True)
        row["sampled_ratio"] = statistics.median(drawn / plain for drawn, plain in pairs)
    return row


def cpu_name() -> str:
    """Return the processor's model and how many of it there are."""
    lines = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{len(lines)} x {lines[0]}" if lines else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--spread", choices=("log", "even"), default="log", help="of the prompts' lengths")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-reference", action="store_true", help="leave transformers out")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "int8", "fp8"), default="auto")
    parser.add_argument("--sampled", action="store_true", help="also with temperature 1, top_k 50, top_p 0.9")
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reference = None if args.no_reference else build_transformers(MODEL)
    rows = []
    print(f"{args.prompts} prompts of 32 to 256 tokens, {args.tokens} new tokens each, float32, {args.threads} threads")
    for batch in args.batch:
        row = measure(batch, args, reference)
        rows.append(row)
        rates = ", ".join(f"{name} {statistics.median(each):.1f}" for name, each in row["tokens_per_s"].items())
        extra = f", {row['ratio']:.2f} times transformers" if "ratio" in row else ""
        extra += f", sampled at {row['sampled_ratio']:.2f} of greedy" if "sampled_ratio" in row else ""
        print(f"batch {batch:>3}: tokens/s {rates}{extra}", flush=True)
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        machine = {"cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__}
        if reference is not None:
            import transformers

            machine["transformers"] = transformers.__version__
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"settings": settings, "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
