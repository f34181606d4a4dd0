"""`python -m frechet_gan` is the command `frechet-gan`."""

from frechet_gan.cli import main

main()
