"""Adapters made part of their base in memory, also where it is packed in 4 bits. On disk: `tools/merge_on_disk`."""
