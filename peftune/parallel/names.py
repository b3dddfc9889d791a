"""Names that the launcher and the launched process share."""

ASKED = "PEFTUNE_PROCESSES"
"""Environment variable in which `peftune train` hands down the number of processes it asked for."""

STRATEGIES = ("single", "ddp")
"""Ways to use several devices in this version."""
