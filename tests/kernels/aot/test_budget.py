"""This module checks the comparison with the ceilings, and holds the kernels to them. It does not know the kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import triton
from octavo.kernels.aot.budget import BUDGET, broken, updated
from octavo.kernels.aot.targets import BUDGETED

from .programs import output_of, run_program

ROW: dict[str, Any] = {
    "model": "m", "target": "sm_90", "kernel": "decode_kernel", "variant": "block 64", "regs": 100, "spills": 0,
    "shared_bytes": 1000, "instructions": 400, "loop_instructions": 200, "masked_loop_instructions": None,
    "ctas_per_sm": 4, "mma": {"HMMA": 32}, "masked_mma": {}, "loads": {"128": 4, "32": 2}, "stores": {"128": 1},
    "async_loads": {}, "flop_per_wi": None, "bytes_per_wi": 20.0,
}  # fmt: skip
GATE = {
    "kernel": "decode_*", "variant": "*", "model": "m", "target": "sm_90",
    "limits": {"min_bytes_per_wi": 17.5, "regs": 110},
}  # fmt: skip
EMPTY = json.dumps({"triton": triton.__version__, "gates": [GATE], "ceilings": {}})


def test_a_row_keeps_the_ceilings_measured_from_it() -> None:
    assert broken(updated(EMPTY, [ROW]), [ROW], complete=True) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"regs": 106}, "regs is 106, at most 105 allowed"),
        ({"regs": 111}, "regs is 111, at most 110 allowed"),
        ({"spills": 1}, "spills is 1, at most 0 allowed"),
        ({"loop_instructions": 211}, "loop_instructions is 211, at most 210 allowed"),
        ({"shared_bytes": 1051}, "shared_bytes is 1051, at most 1050 allowed"),
        ({"ctas_per_sm": 3}, "ctas_per_sm is 3, at least 4 allowed"),
        ({"bytes_per_wi": 17.4}, "bytes_per_wi is 17.4, at least 17.5 allowed"),
        ({"bytes_per_wi": None}, "bytes_per_wi is None, at least 17.5 allowed"),
        ({"loads": {"128": 4, "32": 3}}, "narrow_accesses is 3, at most 2 allowed"),
        ({"stores": {"narrow": 1}}, "narrow_accesses is 3, at most 2 allowed"),
        ({"mma": {"HGMMA": 4}}, "no HMMA in a main loop that has {'HGMMA': 4}"),
        ({"masked_mma": {"IMMA": 4}}, "no HMMA in a main loop"),
        ({"variant": "block 16"}, "no ceiling is written down"),
    ],
)
def test_a_broken_ceiling_is_named(change: dict[str, Any], says: str) -> None:
    found = broken(updated(EMPTY, [ROW]), [ROW | change])
    assert any(says in line for line in found), found


def test_a_ceiling_that_nothing_needs_is_named_where_all_is_compared() -> None:
    budget = updated(EMPTY, [ROW, ROW | {"variant": "gone"}])
    assert broken(budget, [ROW]) == []
    assert broken(budget, [ROW], complete=True) == ["m/sm_90/decode_kernel/gone: a ceiling without a variant"]
    assert broken(updated(budget, [ROW], complete=True), [ROW], complete=True) == []


def test_under_another_triton_only_spills_count() -> None:
    budget = json.dumps({"triton": "0.1", "gates": [GATE], "ceilings": {}})
    assert broken(budget, [ROW | {"regs": 200}]) == []
    assert len(broken(budget, [ROW | {"spills": 2}])) == 1


def test_a_spill_is_allowed_where_a_person_wrote_it_and_never_by_updating() -> None:
    spilling = ROW | {"spills": 2}
    budget = updated(EMPTY, [spilling])
    assert len(broken(budget, [spilling])) == 1
    data = json.loads(budget)
    data["ceilings"]["m/sm_90/decode_kernel/block 64"]["spills"] = 2
    known = json.dumps(data)
    assert broken(known, [spilling]) == broken(updated(known, [spilling]), [spilling]) == []
    assert len(broken(known, [ROW | {"spills": 3}])) == 1
    assert "spills" not in updated(known, [ROW])


def test_updating_keeps_the_gates() -> None:
    assert json.loads(updated(EMPTY, [ROW]))["gates"] == [GATE]


def test_the_budget_file_is_as_updating_writes_it() -> None:
    text = BUDGET.read_text(encoding="utf-8")
    assert updated(text, []).replace(triton.__version__, json.loads(text)["triton"], 1) == text


def check(*arguments: str) -> list[str]:
    done = run_program("-m", "octavo.kernels.aot", "check", *arguments)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def test_the_main_kernels_keep_their_ceilings(tmp_path: Path) -> None:
    kernels = "decode_kernel,_prefill,_rms_norm_kernel"
    assert check("--kernel", kernels, "--target", "sm_90", "--block-size", "64", "--cache", str(tmp_path)) == []


@pytest.mark.full
@pytest.mark.parametrize("target", BUDGETED)
def test_every_kernel_keeps_its_ceilings(target: str, tmp_path: Path) -> None:
    assert check("--target", target, "--cache", str(tmp_path)) == []


def test_a_report_has_a_row_per_variant_and_is_quick_the_second_time(tmp_path: Path) -> None:
    ways = ("--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html"), "--cache", str(tmp_path / "cache"))
    command = ("-m", "octavo.kernels.aot", "report", "--model", "smollm2-135m", "--kernel", "norm", *ways)
    table = output_of(*command, "--target", "sm_90", "--block-size", "64")
    assert "_rms_norm_kernel" in table
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["triton"] == triton.__version__
    assert [(row["variant"], row["target"]) for row in report["rows"]] == [("norm", "sm_90"), ("add and norm", "sm_90")]
    for row in report["rows"]:
        assert row["regs"] > 0
        assert row["spills"] == 0
        assert row["loads"]
        assert row["constants"]["HIDDEN_SIZE"] == 576
    page = (tmp_path / "r.html").read_text()
    assert "_rms_norm_kernel" in page
    assert "__REPORT__" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    # Remembered results are read, not made: an entry that says otherwise shows.
    for entry in (tmp_path / "cache").iterdir():
        entry.write_text(json.dumps(json.loads(entry.read_text()) | {"regs": 77}))
    output_of(*command, "--target", "sm_90", "--block-size", "64")
    assert [row["regs"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == [77, 77]
