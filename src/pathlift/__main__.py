"""``python -m pathlift`` is the command line."""

from pathlift.cli import main

main()
