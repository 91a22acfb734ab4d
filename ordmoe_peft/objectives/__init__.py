"""Losses as pure functions: tensors in, tensors out. No model, no hooks, one idea a file.

Shape suffixes: B samples, C tiers, S predicted positions, T tokens, E experts.
"""
