"""Run directories: a search on a disk or in an object store."""
