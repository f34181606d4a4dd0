"""Iterative eigensolvers and the like that stand on torch alone."""
