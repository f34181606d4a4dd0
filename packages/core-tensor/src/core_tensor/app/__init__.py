"""What the applications around the kernels share, each thing once; nothing here loads torch when it is imported."""
