"""What the driver does: the method, and the two seams in this process and on Ray."""
