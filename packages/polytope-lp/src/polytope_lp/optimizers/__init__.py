"""Minimizers of the smoothed dual, whose whole state is explicit so that a run can be stopped and resumed."""
