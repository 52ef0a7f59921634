"""The pure core: specs, records, and how a mask is drawn. No I/O, no Ray, no transformers."""
