"""This package holds what several ops share. It does not know any one op."""
