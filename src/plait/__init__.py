"""plait: hybrid post-training that interlaces expert tokens with verified on-policy samples."""

__version__ = "0.1.0"
