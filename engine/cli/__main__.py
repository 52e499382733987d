"""This module lets `python -m octavo.engine.cli` stand in for `octavo`. It does not know the verbs."""

from . import main

main()
