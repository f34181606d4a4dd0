"""Explore/exploit on the last layer of a ranker, and what a policy would have earned on logged events."""
