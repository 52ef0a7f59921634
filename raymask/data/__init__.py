"""Task data: files and hub datasets, labels, splits, token ids and metrics. Runs on the driver."""
