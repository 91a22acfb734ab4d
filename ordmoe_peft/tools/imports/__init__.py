"""Adapters of other tools made OrdMoE adapters."""
