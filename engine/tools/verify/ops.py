"""This module holds the op detector: it captures what ops get and give, and replays them in float64. It does not know
steps, texts or what to conclude.

A replay takes the tensors that the op got, so nothing that went wrong before counts against it, and the parameters that
the reference says: weights, epsilons, scale, window, rotations, positions, slots. Its error is measured in units of
roundoff of the op's dtype, against what the same computation shows in that dtype on the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final

import torch
from octavo.kernels import dispatch
from octavo.kernels.activation import reference as activation
from octavo.kernels.attention import reference as attention
from octavo.kernels.kv_cache import reference as kv_cache
from octavo.kernels.norm import reference as norm
from torch import Tensor
from torch.nn import functional

from ...layers.linear import Linear
from ...layers.norm import Norm
from ...models.decoder import Decoder, LayerCache
from .comparison import unit_of
from .judge import Judge, OpRecord, WrongOp
from .metadata import ExpectedStep
from .reference import Parameters

__all__ = ["OpDetector", "place_of"]

SCORE_FACTOR: Final = 4.0
QUANTUM: Final = {torch.int8: 1.01 / 127, torch.float8_e4m3fn: 2.0**-4}
"""One step of a quantised cache, relative to a row's largest value."""
_PART_NAMES: Final = {
    "attention_norm": "norm before attention",
    "qkv": "qkv projection",
    "o": "output projection",
    "mlp_norm": "norm before the MLP",
    "gate_up": "gate and up projection",
    "up": "up projection",
    "down": "down projection",
    "final_norm": "final norm",
    "lm_head": "head",
}
_PLANNED: Final = ("plan", "worklist", "out")
_WEIGHT_ROWS: Final = 8192
"""Of a weight made float64 at once."""
_Op = Callable[..., Any]


def place_of(name: str) -> tuple[int | None, str]:
    """Return layer and part, in words, of a parameter such as "layers.7.down"."""
    parts = name.split(".")
    return (int(parts[1]) if len(parts) == 3 else None), _PART_NAMES[parts[-1]]


@dataclass(slots=True)
class _Listening:
    """What is known of the step that runs."""

    expected: ExpectedStep | None = None
    sampled_rows: Sequence[int] = ()
    max_rows: int | None = None


class OpDetector:
    """Stands between a decoder and its ops until the end of the `with` statement.

    Args:
        decoder: whose projections to listen to; None: only ops.
        cache: by layer, to tell whose call it is.
        parameters: of the reference; None: those that the ops are given.
    """

    def __init__(
        self,
        decoder: Decoder | None = None,
        cache: Sequence[LayerCache] = (),
        parameters: Parameters | None = None,
    ) -> None:
        self._judge = Judge()
        self._decoder = decoder
        self._layer_of = {layer.k.data_ptr(): index for index, layer in enumerate(cache)}
        self._parameters = parameters
        modules = () if decoder is None else decoder.modules()
        self._names = {id(module.weight): name for name, module in modules if isinstance(module, Norm)}
        self._layer: int | None = None
        self._now: _Listening | None = None
        self._stack = ExitStack()

    def __enter__(self) -> OpDetector:
        watches: dict[str, _Op] = {
            "rms_norm": partial(self._norm, "rms_norm"),
            "layer_norm": partial(self._norm, "layer_norm"),
            "write_kv": self._write_kv,
            "gated_activation": partial(self._activation, "gated_activation"),
            "ungated_activation": partial(self._activation, "ungated_activation"),
            "paged_attention_prefill": partial(self._attention, "paged_attention_prefill"),
            "paged_attention_decode": partial(self._attention, "paged_attention_decode"),
        }
        for op, watch in watches.items():
            self._stack.enter_context(dispatch.override(op, partial(self._call, dispatch.active[op], watch)))
        for name, module in () if self._decoder is None else self._decoder.modules():
            if isinstance(module, Linear):
                module.tap = partial(self._linear, name)
                self._stack.callback(setattr, module, "tap", None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def listen(
        self,
        expected: ExpectedStep | None = None,
        sampled_rows: Sequence[int] = (),
        max_rows: int | None = None,
    ) -> None:
        """Replay every op from now on.

        Args:
            expected: what the step should be told; None: what the ops are given.
            sampled_rows: the token rows that go through the head.
            max_rows: replay of norms, activations and projections at most so many rows, evenly; None: all.
        """
        self._now = _Listening(expected, sampled_rows, max_rows)
        self._layer = None

    def stop(self) -> list[WrongOp]:
        """Replay nothing any more, and return what was wrong, in the order of the calls."""
        self._now = None
        found, self._judge.found = self._judge.found, []
        return found

    @property
    def records(self) -> dict[str, OpRecord]:
        """What the replays have shown, by op."""
        return self._judge.records

    def _call(self, real: _Op, watch: _Op, *args: Any, **kwargs: Any) -> Any:
        return real(*args, **kwargs) if self._now is None else watch(self._now, real, *args, **kwargs)

    def _chosen(self, now: _Listening, num_rows: int) -> list[int]:
        """Return the rows to replay: all, or some from the first to the last."""
        if now.max_rows is None or num_rows <= now.max_rows:
            return list(range(num_rows))
        return [i * (num_rows - 1) // (now.max_rows - 1) for i in range(now.max_rows)]

    def _linear(self, name: str, x: Tensor, y: Tensor) -> None:
        now = self._now
        if now is None or self._parameters is None or len(x) == 0:
            return
        layer, part = place_of(name)
        chosen = self._chosen(now, len(x))
        weight, bias = self._parameters.weight(name), self._parameters.bias(name)
        rows, weight = x[chosen], weight.to(x.device, x.dtype)
        bias = None if bias is None else bias.to(x.device, x.dtype)
        exact = torch.cat([rows.double() @ some.double().T for some in weight.split(_WEIGHT_ROWS)], dim=-1)
        exact = exact if bias is None else exact + bias.double()
        plain = functional.linear(rows, weight, bias)
        token_rows = chosen
        if name == "lm_head" and len(now.sampled_rows) == len(x):
            token_rows = [now.sampled_rows[i] for i in chosen]
        # K roundings, each of a partial sum, add up as a random walk. Measured on SmolLM2: at most 0.6 of this.
        largest = functional.linear(rows.abs(), weight.abs()).double().amax(-1) * weight.shape[1] ** 0.5
        magnitude = largest / exact.abs().amax(-1).clamp_(min=torch.finfo(torch.float64).tiny)
        self._judge(part, y[chosen], exact, plain, rows=token_rows, layer=layer, magnitude=magnitude)

    def _norm_name(self, weight: Tensor, op: str) -> tuple[str | None, int | None, str]:
        name = self._names.get(id(weight))
        return (None, None, op) if name is None else (name, *place_of(name))

    def _norm(
        self, op: str, now: _Listening, real: _Op, x: Tensor, weight: Tensor, *rest: Tensor | None, **given: Any
    ) -> Tensor:
        residual: Tensor | None = given.get("residual")
        old_x, old_residual = x.clone(), None if residual is None else residual.clone()
        y: Tensor = real(x, weight, *rest, **given)
        name, layer, part = self._norm_name(weight, op)
        label = op if part == op else f"{op}, {part}"
        if layer is not None:
            self._layer = layer
        message, eps = "", given["eps"]
        if name is not None and self._parameters is not None:
            weight, bias = self._parameters.weight(name).to(y), self._parameters.bias(name)
            rest = () if op == "rms_norm" else (None if bias is None else bias.to(y),)
            message, eps = _differs("eps", eps, self._parameters.eps(name)), self._parameters.eps(name)
        chosen = self._chosen(now, len(x))
        rows = old_x[chosen]
        if old_residual is not None and residual is not None:
            exact = old_residual[chosen].double() + rows.double()
            self._judge(f"{label}, residual", residual[chosen], exact, None, rows=chosen, layer=layer)
            rows = residual[chosen]  # what is normalised is the sum as rounded
        kwargs = {name: value for name, value in given.items() if name not in ("residual", "out")} | {"eps": eps}
        exact, plain = (
            getattr(norm, op)(*(each if each is None else each.to(dtype) for each in (rows, weight, *rest)), **kwargs)
            for dtype in (torch.float64, y.dtype)
        )
        self._judge(label, y[chosen], exact, plain, rows=chosen, layer=layer, message=message)
        return y

    def _activation(
        self, op: str, now: _Listening, real: _Op, x: Tensor, kind: str, *, out: Tensor | None = None
    ) -> Tensor:
        chosen = self._chosen(now, len(x))
        rows = x[chosen].clone()
        y: Tensor = real(x, kind, out=out)
        replay: Callable[[Tensor], Tensor] = partial(getattr(activation, op), kind=kind)
        if self._parameters is not None and self._layer is not None:
            replay = partial(_activated, self._parameters.activation(self._layer), op == "gated_activation")
        exact, plain = replay(rows.double()), replay(rows.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
        self._judge(op, y[chosen], exact, plain, rows=chosen, layer=self._layer)
        return y

    def _attention(
        self, op: str, now: _Listening, real: _Op, q: Tensor, k_cache: Tensor, v_cache: Tensor, **given: Any
    ) -> Any:
        result = real(q, k_cache, v_cache, **given)
        layer = self._layer_of.get(k_cache.data_ptr(), self._layer)
        message, first = "", 0
        kwargs = {name: _on_host(value) for name, value in given.items() if name not in _PLANNED}
        if now.expected is not None:
            part = now.expected.decode if op == "paged_attention_decode" else now.expected.prefill
            assert part is not None, f"{op} was called and there is nothing for it to do"
            kwargs |= part._asdict()
            if op == "paged_attention_prefill" and now.expected.decode is not None:
                first = int(now.expected.decode.cu_seqlens_q[-1])
        if self._parameters is not None and layer is not None:
            for name, value in (
                ("scale", self._parameters.scale(layer)),
                ("window", self._parameters.window(layer)),
            ):
                message += _differs(name, given.get(name), value)
                kwargs[name] = value
        replay = getattr(attention, op)
        host = [_on_host(each) for each in (q, k_cache, v_cache)]
        # Asked for the denominator, the reference gathers and masks plainly, not by the torch backend's quick walk.
        kwargs["return_lse"] = True
        exact = replay(host[0].double(), *map(_widened, host[1:]), **kwargs)[0]
        plain = replay(*host, **kwargs)[0]
        found = result[0] if given.get("return_lse") else result
        num_rows = int(kwargs["cu_seqlens_q"][-1])
        rows = range(first, first + num_rows)
        results = (_on_host(found)[:num_rows], exact[:num_rows], plain[:num_rows])
        # A weight errs, relative to itself, by units in proportion to its score. Measured on SmolLM2: 2.3 of them.
        keys = _at_all(host[1], kwargs).norm(dim=-1).amax()
        magnitude = host[0][:num_rows].double().norm(dim=-1).amax(-1) * keys * kwargs["scale"] * SCORE_FACTOR
        self._judge(op, *results, rows=rows, layer=layer, message=message, magnitude=magnitude)
        return result

    def _write_kv(
        self,
        now: _Listening,
        real: _Op,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        **given: Any,
    ) -> None:
        self._layer = layer = self._layer_of.get(k_cache.data_ptr())
        before = [_on_host(each).clone() for each in (q, k, v, k_cache, v_cache)]
        scales = {name: _on_host(given.get(name)) for name in ("k_scale", "v_scale")}
        scales = {name: each.clone() if isinstance(each, Tensor) else each for name, each in scales.items()}
        real(q, k, v, k_cache, v_cache, slot_mapping, **given)
        kwargs = {name: _on_host(value) for name, value in given.items() if name not in _PLANNED}
        slots, positions = _on_host(slot_mapping), kwargs["positions"]
        if now.expected is not None:
            slots, positions = torch.from_numpy(now.expected.slots), torch.from_numpy(now.expected.positions)
        message = self._reference_arguments(layer, kwargs, positions)
        replays = []
        for dtype in (torch.float64, q.dtype):
            tensors = [each.clone() if each.dtype in QUANTUM else each.to(dtype, copy=True) for each in before]
            own = {name: each.clone() if isinstance(each, Tensor) else each for name, each in scales.items()}
            q_, k_, v_, k_cache_, v_cache_ = tensors
            kv_cache.write_kv(q_, k_, v_, k_cache_, v_cache_, slots, **(kwargs | own))
            replays.append((tensors, own))
        self._judge_write(layer, message, slots, before, (q, k_cache, v_cache), given, replays)

    def _reference_arguments(self, layer: int | None, kwargs: dict[str, Any], positions: Tensor) -> str:
        """Put the reference's rotations and norms into arguments; return what is said of those that differ."""
        kwargs["positions"] = positions
        if self._parameters is None or layer is None:
            return ""
        message = ""
        rotations = self._parameters.rotations(positions)
        if rotations is not None:
            kwargs["cos_sin"], kwargs["positions"] = rotations.cpu(), torch.arange(len(positions))
        norms = self._parameters.head_norms(layer)
        if norms is not None:
            q_norm, k_norm, eps = norms
            message = _differs("eps", kwargs["eps"], eps)
            for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
                if kwargs.get(name) is None or not torch.equal(kwargs[name], weight.cpu().to(kwargs[name].dtype)):
                    message += f"{name} is not the reference's weight; "
                kwargs[name] = weight.cpu()
            kwargs["eps"] = eps
        return message

    def _judge_write(
        self,
        layer: int | None,
        message: str,
        slots: Tensor,
        before: list[Tensor],
        after: tuple[Tensor, Tensor, Tensor],
        given: dict[str, Any],
        replays: list[tuple[list[Tensor], dict[str, Any]]],
    ) -> None:
        (exact, exact_scales), (plain, plain_scales) = replays
        judge = partial(self._judge, layer=layer, message=message)
        judge("write_kv, queries", _on_host(after[0]), exact[0], plain[0])
        rows = (slots >= 0).nonzero()[:, 0]
        slots = slots[rows]
        for name, at, cache in (("k", 3, after[1]), ("v", 4, after[2])):
            words = "write_kv, keys" if name == "k" else "write_kv, values"
            host, scale = _on_host(cache), f"{name}_scale"
            values = [
                _at_slots(each, slots, factors)
                for each, factors in (
                    (host, _on_host(given.get(scale))),
                    (exact[at], exact_scales[scale]),
                    (plain[at], plain_scales[scale]),
                )
            ]
            dtype = before[0].dtype
            floor = QUANTUM[host.dtype] / unit_of(dtype) if host.dtype in QUANTUM else None
            judge(words, *values, rows=rows.tolist(), dtype=dtype, floor=floor)
            untouched = torch.ones(host.shape[0] * host.shape[2], dtype=torch.bool)
            untouched[slots] = False
            untouched = untouched.view(host.shape[0], 1, host.shape[2])
            changed = (host.view(torch.uint8) != before[at].view(torch.uint8)).any(-1) & untouched
            if changed.any():
                block, _, offset = changed.nonzero()[0].tolist()
                elsewhere = f"slot {block * host.shape[2] + offset} (block {block}) was written, and no token has it; "
                self._judge.found.append(WrongOp(layer, words, 0, torch.inf, torch.inf, 0.0, elsewhere + message))


def _activated(function: Callable[[Tensor], Tensor], is_gated: bool, x: Tensor) -> Tensor:
    gate, *up = x.chunk(2, dim=-1) if is_gated else (x,)
    return function(gate) * up[0] if up else function(gate)


def _on_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _widened(cache: Tensor) -> Tensor:
    return cache if cache.dtype in QUANTUM else cache.double()


def _at_slots(cache: Tensor, slots: Tensor, scale: Any) -> Tensor:
    """Return what lies in slots, dequantised: [T, num_kv_heads, head_dim] in float64."""
    block, offset = slots // cache.shape[2], slots % cache.shape[2]
    values = cache[block, :, offset].double()
    if cache.dtype not in QUANTUM:
        return values
    factors = scale[block, :, offset][..., None] if isinstance(scale, Tensor) and scale.dim() == 3 else scale
    return values * factors


def _at_all(cache: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Return what the sequences of an attention call have in their blocks, dequantised, in float64."""
    block_size = cache.shape[2]
    slots = [
        table.long()[torch.arange(length) // block_size] * block_size + torch.arange(length) % block_size
        for table, length in zip(kwargs["block_table"], kwargs["seq_lens"].tolist(), strict=True)
    ]
    return _at_slots(cache, torch.cat(slots), kwargs.get("k_scale"))


def _differs(name: str, found: Any, expected: Any) -> str:
    """Say that an argument is not the reference's: beyond what rounding it to float32 makes of it."""
    if found == expected:
        return ""
    if isinstance(found, float) and isinstance(expected, float) and abs(found - expected) <= 1e-6 * abs(expected):
        return ""
    return f"{name} is {found}, and {expected} in the reference; "
