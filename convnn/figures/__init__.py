"""Figures in matplotlib: neighbours on images, metrics over epochs and depth."""
