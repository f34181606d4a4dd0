"""The batch job from events to a store of vectors, and its refresh by new events."""
