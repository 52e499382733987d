"""This package holds what a machine without a GPU can prove of the kernels: which variants are compiled, and how they
compile. It does not know what they compute, and nothing that runs a model imports it.
"""
