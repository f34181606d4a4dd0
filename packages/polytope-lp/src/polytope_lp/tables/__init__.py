"""From Arrow tables and Parquet files to problems, and from problems to packed arrays on disk."""
