"""The pure core: what was asked, what was found, and how a mask is drawn. No I/O, no Ray, no transformers."""
