"""Exports of a finished search: the checkpoint that every search writes, and the formats of `raymask export`."""
