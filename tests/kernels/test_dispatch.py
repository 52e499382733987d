"""The choice of a backend: it is honoured or refused, told once, and costs next to nothing."""

from __future__ import annotations

import importlib
import inspect
import logging
import subprocess
import sys
import time
from collections.abc import Iterator

import octavo.kernels
import pytest
import torch
from octavo.kernels import BackendError, available_backends, current_backend, dispatch, rms_norm, use_backend
from octavo.kernels.dispatch import OPS, Backend


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    chosen = dispatch._chosen
    yield
    dispatch._set(chosen)


def test_the_torch_backend_runs_everywhere() -> None:
    assert "torch" in available_backends()
    with use_backend("torch"):
        assert current_backend() == "torch"


def test_a_backend_that_cannot_run_is_refused_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(OPS, "rms_norm", {"torch": ".norm.reference"})
    use_backend("torch")
    with pytest.raises(BackendError, match=r"backend triton cannot run: .+; available: torch"):
        use_backend("triton")
    assert current_backend() == "torch"
    with pytest.raises(BackendError, match=r"rms_norm has no triton implementation; available: torch"):
        dispatch.implementation("rms_norm", "triton")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendError, match=r"unknown backend 'cuda'; available: .*torch"):
        use_backend("cuda")  # type: ignore[arg-type]


def test_setter_and_context() -> None:
    dispatch._set(None)
    with use_backend("torch"):
        assert dispatch._chosen == "torch"
    assert dispatch._chosen is None
    use_backend("torch")
    assert dispatch._chosen == "torch"


def test_the_context_ends_after_an_error() -> None:
    dispatch._set(None)
    with pytest.raises(RuntimeError, match="inside"), use_backend("torch"):
        raise RuntimeError("inside")
    assert dispatch._chosen is None


def test_an_automatic_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._set(None)
    x, weight = torch.ones(1, 4), torch.ones(4)
    with caplog.at_level(logging.INFO, logger="octavo.kernels"):
        rms_norm(x, weight, eps=1e-6)
        octavo.kernels.layer_norm(x, weight, None, eps=1e-6)
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        f"backend {'triton' if torch.cuda.is_available() else 'torch'} chosen automatically"
    ]


def test_a_request_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="octavo.kernels"), use_backend("torch"):
        rms_norm(torch.ones(1, 4), torch.ones(4), eps=1e-6)
    assert not caplog.records


def test_override() -> None:
    x, weight = torch.ones(1, 4), torch.ones(4)
    with dispatch.override("rms_norm", lambda x, weight, **_: x * 7):
        assert rms_norm(x, weight, eps=0.0).tolist() == [[7.0] * 4]
    assert rms_norm(x, weight, eps=0.0).tolist() == [[1.0] * 4]


@pytest.mark.parametrize("op", sorted(OPS))
def test_signatures_agree(op: str) -> None:
    """Every backend's function takes the public function's parameters: names, order, kinds and defaults."""
    public = inspect.signature(getattr(octavo.kernels, op))
    for backend, module in OPS[op].items():
        function = getattr(importlib.import_module(module, "octavo.kernels"), op)
        assert [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()] == [
            (p.name, p.kind, p.default) for p in public.parameters.values()
        ], f"{op} on {backend}"


def test_every_public_name_resolves() -> None:
    for name in octavo.kernels.__all__:
        assert getattr(octavo.kernels, name) is not None
    with pytest.raises(AttributeError, match="no_such_op"):
        octavo.kernels.no_such_op  # noqa: B018


def test_importing_the_package_loads_neither_torch_nor_triton() -> None:
    program = "import sys, octavo.kernels; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_references_do_not_import_triton() -> None:
    modules = sorted({module for modules in OPS.values() for backend, module in modules.items() if backend == "torch"})
    program = (
        "import importlib, sys\n"
        "sys.modules['triton'] = None\n"
        f"for module in {modules!r}: importlib.import_module(module, 'octavo.kernels')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def _seconds_per_call(function: object, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        function(1, 2, eps=1e-6, residual=None, out=None)  # type: ignore[operator]
    return (time.perf_counter() - start) / number


def test_dispatch_costs_little() -> None:
    """A step makes about 300 calls. Measured: 0.2 µs a call; the limit leaves room for a busy machine."""

    def nothing(x: object, weight: object, *, eps: float, residual: object, weight_offset: float, out: object) -> None:
        return None

    with dispatch.override("rms_norm", nothing):
        best = min(_seconds_per_call(rms_norm, 2000) for _ in range(20))
    assert best < 1e-6


def test_backend_names() -> None:
    names: tuple[Backend, ...] = available_backends()
    assert set(names) <= {"torch", "triton"}
