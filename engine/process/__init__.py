"""This package holds the engine in a process of its own: messages, the loop around the core, and the client's end of
the pipe. It does not know text or HTTP.
"""
