"""The command line, ``pathlift``: tables for people, ``--json`` for programs, exit status 2 for bad input."""

from pathlift.cli.app import main

__all__ = ["main"]
