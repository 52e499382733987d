"""This package holds what a machine without a GPU can prove of the kernels: which variants are compiled, and how they
compile. It does not know what they compute. An engine uses it at start-up alone, to compile all it may launch (`warm`).
"""
