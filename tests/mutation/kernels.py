"""This module plants bugs in the source of the Triton kernels and names the checks that must catch them.

It does not know the bugs: `triton/` holds them. A patched file is imported under the kernel's own name, and all other
kernels afresh beside it, so that a bug in a shared helper reaches every op that uses it, and nothing of it stays.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import octavo.kernels
import torch
from octavo.kernels import dispatch
from octavo.kernels.spec import Case, load_specs

from tests.kernels import attention_checks, batch_checks, kv_cache_checks, mlp_checks, norm_checks
from tests.kernels import test_attention_cascade as cascade
from tests.kernels import test_attention_decode_triton as decode
from tests.kernels import test_attention_invariant as invariant
from tests.kernels import test_attention_promises as promises
from tests.kernels import test_attention_quantised as quantised
from tests.kernels.attention_rounding import check_rounding
from tests.kernels.backends import takes
from tests.kernels.calls import INTERPRETER
from tests.kernels.paged import Shape
from tests.kernels.planned import plans
from tests.kernels.sampling import checks as sample_checks
from tests.kernels.sampling import test_logprobs

from . import triton
from .mutants import DECODE, PREFILL, Checks, Mutant
from .triton import Patch

if INTERPRETER:
    from tests.kernels.interpreter import install

    install()

_ROOT: Final = octavo.kernels.__name__
_SHAPES: Final = {
    PREFILL: (
        Shape(((1, 1), (17, 17), (0, 9), (3, 65), (17, 17))),
        Shape(((5, 60), (40, 140)), num_kv_heads=3, group_size=3, window=18, head_dim=80),
        Shape(((33, 64), (1, 1100)), num_kv_heads=1, group_size=4, block_size=64),
        Shape(((40, 70),), num_kv_heads=1, group_size=7, block_size=32, dtype=torch.float16),
    ),
    DECODE: (
        Shape(((1, 1), (1, 32), (0, 9), (1, 65), (3, 7))),
        Shape(((2, 140), (1, 5)), num_kv_heads=3, group_size=3, window=18, head_dim=80),
        Shape(((1, 1030), (2, 1025)), num_kv_heads=1, group_size=2, block_size=64),
        Shape(((1, 5), (1, 600)), block_size=64, window=70),
    ),
}


_QUANTISED: Final = ".attention.quantised_triton"
_INVARIANT: Final = ".attention.invariant_triton"
_INVARIANT_SHAPES: Final = (
    (DECODE, Shape(((2, 40), (1, 5), (0, 3)), num_kv_heads=3, group_size=3, window=7, dtype=torch.float16)),
    (PREFILL, Shape(((1, 1), (33, 33), (3, 65)), dtype=torch.float16, group_size=3)),
    (DECODE, Shape(((1, 1030), (2, 513)), num_kv_heads=1, group_size=1, block_size=64)),
    (PREFILL, Shape(((5, 60), (30, 100)), num_kv_heads=1, group_size=3, window=18, head_dim=80)),
)


def _param_checks(name: str, cases: tuple[Case, ...] | list[Case], check: object) -> Checks:
    cases = [case for case in cases if takes("triton", (case,))]
    return tuple((f"{name}: {case.name}", partial(check, case)) for case in cases)  # type: ignore[arg-type]


def _attention_checks(op: str) -> Checks:
    spec = load_specs()[op]
    cases = [case for case in spec.cases if case.tier == "test" and takes("triton", (case,))]
    named: list[tuple[str, object]] = [
        (f"rounding: {case.name}", partial(check_rounding, spec, case, 0)) for case in cases
    ]
    for shape in _SHAPES[op]:
        checks = attention_checks.EXACT | (attention_checks.EXACT_WINDOW if shape.window is not None else {})
        named += [
            (f"exact: {name}", partial(check, op, shape)) for name, check in checks.items() if takes("triton", (name,))
        ]
    for name, check in attention_checks.INVARIANCE.items():
        named.append((f"invariance: {name}", partial(check, op, _SHAPES[op][0])))
    if op == PREFILL:
        named.insert(0, ("exact: short list", promises.check_short_list))
    else:
        named.insert(0, ("exact: scratch", partial(decode.check_scratch, False)))
    return (*named, *_quantised_checks(op))  # type: ignore[return-value]


def _quantised_checks(op: str) -> Checks:
    """Return what attention over quantised caches must satisfy besides."""
    found: list[tuple[str, Callable[[], None]]] = []
    for kind in ("int8", "e4m3"):
        for dtype in (torch.float16, torch.float32):
            found.append(("exact: values", partial(quantised.test_every_byte_of_a_value, "triton", op, kind, dtype)))
        found.append(("exact: keys", partial(quantised.test_every_byte_of_a_key, "triton", op, kind, torch.bfloat16)))
        for check in (
            quantised.test_a_key_that_is_no_number_spoils_the_rows_that_see_it,
            quantised.test_a_value_that_is_no_number_spoils_its_element,
            quantised.test_all_values_zero,
        ):
            found.append((f"exact: {check.__name__.removeprefix('test_')}", partial(check, "triton", op, kind)))
        for power in (-60, 40):
            found.append(
                (
                    "exact: range",
                    partial(quantised.test_bfloat16_reaches_further_than_float16, "triton", op, kind, power),
                )
            )
    scales = partial(quantised.test_scales_of_neighbours_differ_by_far, "triton", op, torch.float16)
    found.append(("rounding: scales", scales))
    found.append(
        ("exact: layer's scales", partial(quantised.test_a_scale_is_a_number_or_a_tensor_of_one, "triton", op))
    )
    return tuple(found)


def _planned(check: Callable[..., None], *arguments: object) -> None:
    with plans(invariant=True, repeat=False):
        check(*arguments)


def _invariant_checks() -> Checks:
    """Return what both ops must satisfy with invariant plans, quick checks first."""
    exact = attention_checks.EXACT | attention_checks.EXACT_WINDOW
    cases = [param.values for param in invariant.CASES if not param.marks]
    found: list[tuple[str, Callable[[], None]]] = [
        (f"rounding: {case.name}", partial(invariant.test_rounding, op, case)) for op, case in cases
    ]
    found.append(("exact: many heads", partial(invariant.test_a_group_of_more_heads_than_rows, DECODE)))
    for dtype in (torch.float16, torch.float32):
        found.append(("invariance: drafts", partial(invariant.test_a_verified_draft_keeps_its_bits, dtype)))
        found.append(("invariance: batches", partial(invariant.test_batch_and_order_change_no_bit, dtype)))
        found.append(("invariance: features", partial(invariant.test_features_keep_their_bits, "all", dtype)))
        for length, window in invariant.ENDS:
            found.append(("invariance: splits", partial(invariant.test_splits_keep_their_bits, dtype, length, window)))
    for op, shape in _INVARIANT_SHAPES:
        names = attention_checks.EXACT if shape.window is None else exact
        found += [
            (f"exact: {name}", partial(_planned, check, op, shape))
            for name, check in names.items()
            if name != "quantised_needle"
        ]
    return tuple(found)


def _cascade_checks() -> Checks:
    """Return what decode must satisfy where sequences share keys, quick checks first."""
    found = [(f"exact: {case.name}", partial(cascade.check_what_each_row_reads, case)) for case in cascade.MIXED[:2]]
    found += [("exact: claims", cascade.check_claims_beyond_the_rows), ("exact: window", cascade.check_window)]
    cases = (*cascade.MIXED[2:], *cascade.KINDS)
    return (*found, *((f"rounding: {case.name}", partial(cascade.check_rounding, case)) for case in cases))


def _logprob_checks() -> Checks:
    found = [
        ("rounding: log-probabilities", partial(test_logprobs.test_against_float64, "triton", case, range(1)))
        for case in test_logprobs.CASES
        if takes("triton", (case,))
    ]
    found += [
        (f"exact: {check.__name__.removeprefix('test_')}", partial(check, "triton"))
        for check in (test_logprobs.test_ties_and_extremes, test_logprobs.test_mass_of_a_long_tail_is_not_lost)
    ]
    return tuple(found)


def _checks(op: str) -> Checks:
    """Return what an op must satisfy on the Triton backend, quick checks first."""
    if op in _SHAPES:
        return _attention_checks(op)
    if op == "plan_paged_attention":
        return ()
    if op == "sample":
        return tuple(
            (f"exact: {check.__name__.removeprefix('check_')}", partial(check, 0)) for check in sample_checks.CHECKS
        )
    if op == "log_softmax_top":
        return _logprob_checks()
    all_checks: dict[str, Checks] = {
        "expand_rows": batch_checks.CHECKS,
        "write_kv": kv_cache_checks.CHECKS,
        "copy_blocks": kv_cache_checks.COPY_CHECKS,
        "rms_norm": norm_checks.RMS_CHECKS,
        "layer_norm": norm_checks.LAYER_CHECKS,
        "gated_activation": mlp_checks.CHECKS,
        "ungated_activation": mlp_checks.CHECKS,
    }
    return tuple((name, check) for name, check in all_checks.get(op, ()) if takes("triton", getattr(check, "args", ())))


def _path(module: str) -> Path:
    """Return the file of a kernel module, ".attention.decode_triton", without importing it."""
    return Path(octavo.kernels.__file__).parent.joinpath(*module.split(".")).with_suffix(".py")


def _imports(module: str) -> dict[str, int]:
    """Return the kernel modules of its own folder that a module needs, by how many imports away; itself is 0."""
    folder = module.rpartition(".")[0]
    found, new = {}, {module}
    while new:
        found |= dict.fromkeys(new, max(found.values(), default=-1) + 1)
        names = {name for at in new for name in re.findall(r"from \.(\w+_triton) import", _path(at).read_text())}
        new = {f"{folder}.{name}" for name in names} - found.keys()
    return found


def ops_of(module: str) -> list[str]:
    """Return the ops whose kernels are in this module or use it, those that use it most directly first."""
    distance = {op: _imports(where["triton"]).get(module) for op, where in dispatch.OPS.items() if "triton" in where}
    used = [(far, op) for op, far in distance.items() if far is not None]
    return [op for _, op in sorted(used, key=lambda pair: pair[0])]


@contextmanager
def planted(patch: Patch | None) -> Iterator[None]:
    """Put the Triton backend in force with a bug in it; None: without."""
    kept = {name: module for name, module in sys.modules.items() if name.startswith(_ROOT) and name.endswith("_triton")}
    for name in kept:
        del sys.modules[name]
    try:
        with tempfile.TemporaryDirectory() as folder:
            if patch is not None:
                _import_patched(patch, Path(folder))
            with dispatch.use_backend("triton"):
                yield
    finally:
        for name in [n for n in sys.modules if n.startswith(_ROOT) and n.endswith("_triton")]:
            del sys.modules[name]
        sys.modules.update(kept)
        for name, module in kept.items():
            package, _, leaf = name.rpartition(".")
            setattr(sys.modules[package], leaf, module)
        dispatch.active.clear()


def patched_source(patch: Patch) -> str:
    """Return the kernel's source with the bug in it."""
    source = _path(patch.module).read_text()
    count = source.count(patch.old)
    assert count == 1, f"{patch.name}: {patch.old!r} is in {patch.module} {count} times"
    return source.replace(patch.old, patch.new)


def _import_patched(patch: Patch, folder: Path) -> None:
    name = _ROOT + patch.module
    path = folder / f"{patch.module.rpartition('.')[2]}.py"
    path.write_text(patched_source(patch))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    setattr(sys.modules[spec.parent or ""], name.rpartition(".")[2], module)


def patches() -> dict[str, tuple[Patch, ...]]:
    """Return the planted bugs by the name of the module that lists them."""
    names = sorted(found.name for found in pkgutil.iter_modules(triton.__path__))
    return {name: importlib.import_module(f"{triton.__name__}.{name}").PATCHES for name in names}


def mutants() -> list[Mutant]:
    """Return every bug of a kernel that runs here."""
    if not INTERPRETER and "triton" not in dispatch.available_backends("rms_norm"):
        return []
    found = []
    for author, group in patches().items():
        for patch in group:
            checks = tuple(check for op in ops_of(patch.module) for check in _checks(op))
            if patch.module == _QUANTISED:  # nothing else of the ops would notice
                checks = tuple(check for op in (DECODE, PREFILL) for check in _quantised_checks(op))
            if patch.module == _INVARIANT:  # which the ops use for invariant plans only
                checks = _invariant_checks()
            if author == "cascade":  # of one module among others, where sequences share keys
                checks = _cascade_checks()
            name = f"triton{patch.module.removesuffix('_triton')}: {patch.name}"
            found.append(Mutant(name, patch.meaning, partial(planted, patch), checks))
    return found


def a_handful() -> list[Mutant]:
    """Return the first bug of each kernel module: each author puts one there that is caught quickly."""
    first: dict[str, Mutant] = {}
    for mutant in mutants():
        first.setdefault(mutant.name.partition(": ")[0], mutant)
    return list(first.values())


def healthy() -> list[Mutant]:
    """Return the kernels as they are, op by op: every check must pass."""
    ops = [op for op, where in dispatch.OPS.items() if "triton" in where and _checks(op)]
    found = [Mutant(f"triton: {op}", "", partial(planted, None), _checks(op)) for op in ops]
    found.append(Mutant("triton: shared prefixes", "", partial(planted, None), _cascade_checks()))
    return [*found, Mutant("triton: invariant plans", "", partial(planted, None), _invariant_checks())]
