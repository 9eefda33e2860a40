"""Measurements: each function makes its own input and returns plain numbers."""
