"""This package holds what is measured and compared on a GPU. It does not know in which order, nor within what time.

A package, not files beside the others: a module called `kernels` on the path passes for Hugging Face's package of that
name, which transformers imports.
"""
