"""This package holds the modules a decoder is made of. It does not know which model they belong to.

Shape suffixes used throughout: T tokens of the step, H hidden size, Q query heads, K KV heads, D head_dim.
"""
