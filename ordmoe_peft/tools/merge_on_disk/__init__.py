"""An adapter merged into a checkpoint's files, stack by stack, without the model in memory."""
