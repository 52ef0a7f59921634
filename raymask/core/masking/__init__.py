"""Masks: scores, samplers, patterns, allocations, and how they make a mask. Knows no record."""
