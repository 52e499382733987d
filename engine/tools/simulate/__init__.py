"""This package holds the simulation of a workload: the engine's own scheduler on a clock that a cost model moves. It
does not know how it is asked for.
"""
