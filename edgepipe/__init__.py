"""edgepipe: compress a language model for a small device, and measure what came out."""

__version__ = "0.1.0"
