"""This package holds output that follows a grammar: which tokens may come next. It does not know the sampler."""
