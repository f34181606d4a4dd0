"""`python -m meta_embed` is the command `meta-embed`."""

from meta_embed.cli import main

main()
