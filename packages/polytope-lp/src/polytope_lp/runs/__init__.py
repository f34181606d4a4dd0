"""What the command line leaves on disk: solution folders, checkpoints, and runs of several processes."""
