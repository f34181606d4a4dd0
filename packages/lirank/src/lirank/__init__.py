"""LiRank: ranking models with history, calibration, compression and serving, trained on your Parquet logs."""
