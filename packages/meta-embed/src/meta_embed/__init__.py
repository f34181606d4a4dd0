"""LiMAML: per-member vectors learned without retraining, refreshed, stored and served."""
