"""`python -m sgd_stability` is the command `sgd-stability`."""

from sgd_stability.cli import main

main()
