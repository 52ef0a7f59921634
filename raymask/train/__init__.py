"""Models, masks and training inside a worker. Does not import Ray."""
