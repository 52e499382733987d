"""This package holds the tools around an engine: what loads a server and judges its speed. It does not know argv."""
