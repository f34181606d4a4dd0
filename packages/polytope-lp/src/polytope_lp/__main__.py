"""`python -m polytope_lp` is the command `polytope-lp`."""

from polytope_lp.cli import main

main()
