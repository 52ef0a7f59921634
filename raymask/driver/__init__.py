"""Driver: the method, level by level."""
