"""Transport plans and the losses that are built on them."""
