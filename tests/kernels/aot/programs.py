"""This module holds how tests run programs that compile: in processes without Triton's interpreter. It does not know
what they compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_program(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments; a program of this folder goes by its name."""
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | env
    arguments = [str(HERE / part) if part.endswith(".py") else part for part in command]
    return subprocess.run(
        [sys.executable, *arguments], env=settings, capture_output=True, text=True, timeout=900, check=False
    )


def output_of(*command: str, **env: str) -> str:
    """Return what a program prints; it must succeed."""
    done = run_program(*command, **env)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout
