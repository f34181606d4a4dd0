"""For tests and benchmarks: error measures, awkward shapes, timing, ahead-of-time compilation."""
