"""`python -m quantease` is the command `quantease`."""

from quantease.cli import main

main()
