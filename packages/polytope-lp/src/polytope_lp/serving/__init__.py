"""What prices are used for after the solve: scoring new sources, whole amounts, and budget pacing."""
