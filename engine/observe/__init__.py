"""This package holds what is shown of a run, all computed from its events: the ring they are kept in, explanations,
traces and metrics. It does not know who runs the engine.
"""
