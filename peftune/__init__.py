"""peftune: fine-tune transformer models with one loop, and prove what the run did."""

__version__ = "0.1.0"
