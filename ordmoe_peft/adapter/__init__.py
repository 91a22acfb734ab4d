"""The adapter on a model: its configuration, where it goes, how it is attached, taken off, saved and exported."""
