"""Events of entities, cut in time: schema, reader, ragged batches, splits, episodes."""
