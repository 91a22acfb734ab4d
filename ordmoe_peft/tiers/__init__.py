"""Tiers: which experts rank where for a token, and how a forward pass is held to one tier."""
