"""What the driver does: the method, the two seams in this process and on Ray, and the export."""
