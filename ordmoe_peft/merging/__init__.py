"""Adapters made part of their base: in memory, where the base may be packed in 4 bits, and on disk, stack by stack."""
