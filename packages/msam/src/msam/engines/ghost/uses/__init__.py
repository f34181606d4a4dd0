"""How a tracked parameter may be used, each with an exact rule for both passes."""
