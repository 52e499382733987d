"""This package holds where time goes: in kernels, and in the steps of an engine. It does not know argv."""
