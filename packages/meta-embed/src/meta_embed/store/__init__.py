"""Stores of vectors behind one interface: LMDB, SQLite, Parquet, Redis."""
