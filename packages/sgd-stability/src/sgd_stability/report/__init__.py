"""What an analysis finds: thresholds, verdicts, maps, pictures."""
