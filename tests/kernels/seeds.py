"""This module holds how a spec's case becomes inputs. It does not know the op."""

from __future__ import annotations

from typing import Any

from octavo.kernels.spec import Case, OpSpec, generator


def case_inputs(spec: OpSpec, case: Case, seed: int) -> dict[str, Any]:
    """Draw the inputs of one case: the same for the same seed, whatever ran before."""
    return spec.make_inputs(case, generator(spec.name, case.name, seed))
