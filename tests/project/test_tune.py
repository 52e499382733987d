"""This module checks the tuning of launch settings with a clock that is made up, and the tables it writes. It does not
know a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from octavo.kernels.attention import decode_triton, prefill_triton
from octavo.kernels.common import tuned
from octavo.kernels.common.launch import Target

from .gpu_benchmarks import ROOT, load

KEY = "decode head_dim=128 dtype=bfloat16 cache_bits=16"
OWN = {"block_n": 64, "num_warps": 4, "num_stages": 3, "programs_per_sm": 3}
QUICK, WRONG, OTHER = (OWN | {"block_n": 128, "num_stages": stages} for stages in (2, 3, 4))
H100 = Target(90, 132, 232_448)
MEASURED = dict.fromkeys(tuned.MEASURED, "made up")


@pytest.fixture(scope="module")
def tune() -> ModuleType:
    load("gpu.store")
    spec = importlib.util.spec_from_file_location("tune_script", ROOT / "scripts" / "tune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setitem(__import__("sys").modules, "tune_script", module)
        spec.loader.exec_module(module)
    return module


class MadeUpClock:
    """Takes what each candidate is said to take, give or take some noise."""

    def __init__(self, seconds: Mapping[str, float], noise: float = 0.003) -> None:
        self._seconds, self._noise, self._rng = seconds, noise, random.Random(0)

    def samples(self, calls: Mapping[str, Any]) -> dict[str, list[float]]:
        return {
            name: [
                self._seconds.get(name, 1e-4) * self._rng.uniform(1 - self._noise, 1 + self._noise) for _ in range(25)
            ]
            for name in calls
        }

    def graphed(self, call: Any) -> Any:
        return call


def settings_in_force() -> Mapping[str, int]:
    return tuned.tuned("decode", 90, head_dim=128, dtype=torch.bfloat16, quantised=False)


def bout(tune: ModuleType) -> Any:
    """A case that is wrong under some settings."""

    def check(found: Mapping[str, int]) -> None:
        assert found != WRONG, "off by 9 u of at most 2 u"

    return tune.Bout("case", settings_in_force, check)


def test_takes_the_quickest_that_is_right(tune: ModuleType) -> None:
    clock = MadeUpClock({tune.label(QUICK): 0.9e-4, tune.label(WRONG): 0.5e-4, tune.label(OTHER): 1.1e-4})
    said: dict[str, str] = {}
    found = tune.contest(KEY, [OTHER, WRONG, QUICK], [bout(tune)], clock, said.__setitem__)
    assert (found["status"], found["settings"]) == ("won", QUICK)
    assert 1.1 < found["gain"] < 1.12
    assert found["us"]["case"] == pytest.approx(90, rel=0.01)
    assert said[tune.label(WRONG)].startswith("AssertionError: off by 9 u of at most 2 u")
    assert settings_in_force() == {}, "a candidate's settings are still in force"


@pytest.mark.parametrize(("seconds", "noise"), [(0.99e-4, 0.001), (1e-4, 0.3), (1.2e-4, 0.01)])
def test_keeps_the_default_unless_the_gain_is_sure(tune: ModuleType, seconds: float, noise: float) -> None:
    clock = MadeUpClock(dict.fromkeys(map(tune.label, (QUICK, OTHER)), seconds), noise)
    assert tune.contest(KEY, [QUICK, OTHER], [bout(tune)], clock)["status"] == "default"


def test_a_gain_in_one_case_pays_for_no_loss_in_another(tune: ModuleType) -> None:
    class Uneven(MadeUpClock):
        def samples(self, calls: Mapping[str, Any]) -> dict[str, list[float]]:
            self._seconds = {tune.label(QUICK): 0.5e-4 + 0.6e-4 * (self.turn % 2)}
            self.turn += 1
            return super().samples(calls)

        turn = 0

    cases = [tune.Bout(name, settings_in_force, lambda _: None) for name in ("one", "other")]
    found = tune.contest(KEY, [QUICK], cases, Uneven({}))
    assert found["first_round"][tune.label(QUICK)] > 1.1
    assert found["status"] == "default"


def test_stops_when_time_is_up(tune: ModuleType) -> None:
    found = tune.contest(KEY, [QUICK], [bout(tune)], MadeUpClock({}), is_late=lambda: True)
    assert found["status"] == "out of time"


def test_what_took_its_process_with_it_is_not_tried_again(tune: ModuleType, tmp_path: Path) -> None:
    state = tune.State(tmp_path / "tune.json", {"source": "a"})
    state.job(KEY)["refused"]["one"] = "begun"
    state.save()
    assert tune.State(tmp_path / "tune.json", {"source": "a"}).job(KEY)["refused"] == {"one": "crashed"}
    assert tune.State(tmp_path / "tune.json", {"source": "b"}).job(KEY)["refused"] == {}


def test_candidates_that_spill_or_do_not_fit_are_refused(tune: ModuleType) -> None:
    good = {"spills": 0, "shared_bytes": 200_000, "ctas_per_sm": 1}
    assert tune.refusal([good], "sm_90") is None
    assert tune.refusal([good, good | {"spills": 8}], "sm_90") == "8 spills"
    assert "do not fit" in tune.refusal([good | {"shared_bytes": 240_000}], "sm_90")


def test_says_that_nothing_is_timed_without_a_gpu(
    tune: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--out", str(tmp_path)]) == 2
    assert "nothing can be timed here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_job_has_a_key_of_the_table(tune: ModuleType, tmp_path: Path) -> None:
    entries = {job.key: {"settings": job.candidates[0], "measured": MEASURED} for job in tune.jobs()}
    path = tmp_path / "sm_90.json"
    tune.write(path, {"arch": 90, "entries": entries})
    assert tuned.read_table(path) == entries
    assert KEY in entries


@pytest.mark.parametrize("path", sorted(tuned.FOLDER.glob("*")), ids=lambda path: path.name)
def test_kept_tables_are_right(path: Path) -> None:
    tuned.read_table(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"decode head_dim=128": {}}, "unknown entry 'decode head_dim=128'"),
        ({"norm head_dim=1 dtype=float16 cache_bits=8": {}}, "unknown entry 'norm"),
        ({KEY: []}, "must have the settings block_n"),
        ({KEY: {"settings": OWN | {"more": 1}}}, "must have the settings block_n"),
        ({KEY: {"settings": OWN | {"block_n": 96}}}, "block_n is 96; allowed: \\(64, 128\\)"),
        ({KEY: {"settings": OWN | {"num_warps": True}}}, "num_warps is True"),
        ({KEY: {"settings": OWN}}, "must say how it was measured"),
    ],
)
def test_damaged_entries_are_refused_by_name(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps({"arch": 90, "entries": entry}))
    with pytest.raises(ValueError, match=f"sm_90.json: .*{message}"):
        tuned.read_table(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"arch": 80, "entries": {}}', '{"arch": 90}'])
def test_damaged_tables_are_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"sm_90.json: no"):
        tuned.read_table(path)


def test_an_entry_is_what_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that order sums are the same for any batch. `keys` runs the launchers, and so lists what they choose."""
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps({"arch": 90, "entries": {KEY: {"settings": QUICK, "measured": MEASURED}}}))

    def launched() -> list[tuple[int, int]]:
        found = []
        for max_query_len in (1, 4, 16):
            settings = decode_triton.config(
                group_size=4, max_query_len=max_query_len, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16,
                draft=False, quantised=False, target=H100,
            )  # fmt: skip
            found.append((settings.block_n, settings.num_stages))
        return found

    assert launched() == [(64, 3)] * 3
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.tuned.cache_clear()
    try:
        assert launched() == [(128, 2)] * 3
    finally:
        tuned.tuned.cache_clear()


def test_an_entry_is_of_its_geometry_alone() -> None:
    prefill = "prefill head_dim=64 dtype=float16 cache_bits=8 plain=True"
    with tuned.trying(prefill, {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2}):
        found = {
            (head_dim, dtype, quantised, plain): prefill_triton.config(
                head_dim=head_dim, group_size=4, dtype=dtype, plain=plain, quantised=quantised, target=H100
            ).num_warps
            for head_dim in (64, 128)
            for dtype in (torch.float16, torch.bfloat16, torch.float32)
            for quantised in (False, True)
            for plain in (False, True)
        }
    assert [geometry for geometry, num_warps in found.items() if num_warps == 4] == [(64, torch.float16, True, True)]


def test_wide_tiles_keep_their_own_number_of_programs() -> None:
    def programs(max_query_len: int) -> int:
        return decode_triton.config(
            group_size=4, max_query_len=max_query_len, num_kv_heads=1, head_dim=128, dtype=torch.bfloat16, draft=False,
            quantised=False, target=H100,
        ).num_programs  # fmt: skip

    before = programs(1), programs(8)
    with tuned.trying(KEY, OWN | {"programs_per_sm": 1}):
        assert (programs(1), programs(8)) == (before[0] // 3, before[1])
