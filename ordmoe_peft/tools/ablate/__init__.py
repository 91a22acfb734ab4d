"""Runs over a grid of settings and seeds, and what they differ in."""
