"""The optimizer `MSAM`, and a look at what its steps do."""
