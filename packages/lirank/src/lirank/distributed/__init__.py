"""Tables that do not fit one process: rows shared out, trained by exchange, saved for any number of ranks."""
