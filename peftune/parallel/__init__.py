"""Processes and strategies. The only room that imports torch.distributed and deepspeed."""
