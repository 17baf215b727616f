"""Sweeps: the points of a sweep file, running them, and the report on their results."""
