"""Adapters in forms that other software loads."""
