"""This package holds output that follows a grammar: which tokens may come next. It does not know the sampler."""

from __future__ import annotations

from .compiler import GrammarCompiler, Vocabulary

__all__ = ["GrammarCompiler", "Vocabulary"]
