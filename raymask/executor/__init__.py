"""Executors: early evaluations and fine-tunings in this process, or on a Ray cluster."""
