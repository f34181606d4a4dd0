"""Reading Parquet logs in bounded memory, in an order that repeats, and turning them into batches."""
