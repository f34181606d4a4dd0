"""The parts of a ranking network, each a module that works alone."""
