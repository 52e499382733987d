"""This package holds the verification of an engine against a reference, and the detectors that say where the two part.
It does not know argv.

    report = verify(LLM("smollm2-135m").engine, built_in_texts(...))
    report.passed, report.first
"""

from .page import verify_page
from .report import ConditionResult, Finding, Report, report_record
from .texts import Text, built_in_texts
from .verifier import AGAINST, Focus, verify

__all__ = [
    "AGAINST",
    "ConditionResult",
    "Finding",
    "Focus",
    "Report",
    "Text",
    "built_in_texts",
    "report_record",
    "verify",
    "verify_page",
]
