"""The one loop, the step, the one evaluation harness, checkpoints."""
