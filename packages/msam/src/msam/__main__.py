"""`python -m msam` is the command `msam`."""

from msam.cli import main

main()
