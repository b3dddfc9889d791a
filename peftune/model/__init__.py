"""Models, heads, adapters, precision, saving. The only room that imports peft and bitsandbytes."""
