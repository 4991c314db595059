"""Types, contracts, the loop, batching, the DeepSpeed learner, weight sync, checkpoints, metrics."""

from .. import __version__ as __version__
