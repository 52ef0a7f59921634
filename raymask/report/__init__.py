"""Reports of a run: console output, progress, plots, and the HTML page."""
