"""This package holds what runs one step: inputs, KV storage, attention metadata, sampler. It does not know the queue.

Nothing is imported here: `fake_runner` works where torch is not wanted.
"""
