"""Images: reading, writing, data sets and augmentation."""
