"""One run on several machines: what starts its processes there. Imports no torch."""
