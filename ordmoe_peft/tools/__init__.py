"""The workshop beside the method: measure, ablate, plan, merge on disk, report. The core imports none of it."""
