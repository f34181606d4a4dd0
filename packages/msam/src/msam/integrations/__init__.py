"""mSAM inside training frameworks."""
