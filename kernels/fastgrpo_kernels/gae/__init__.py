"""Generalised advantage estimation over packed sequences."""
