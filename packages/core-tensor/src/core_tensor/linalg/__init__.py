"""Iterative eigensolvers and the like that need only torch."""
