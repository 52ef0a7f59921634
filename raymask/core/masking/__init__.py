"""Masks: scores, samplers, patterns, allocations, and how they make a mask. Takes a candidate, no other record."""
