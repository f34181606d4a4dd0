"""The schema: which columns exist, what they mean, how they become tensors; also the serving contract."""
