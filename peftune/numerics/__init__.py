"""Pure functions on tensors and numbers: losses, schedules, dealing, intervals. No files, no ranks."""
