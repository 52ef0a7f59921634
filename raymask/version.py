"""Which raymask is it? Here, not in the package's metadata: a context carries the code alone."""

__version__ = "0.1.0"
