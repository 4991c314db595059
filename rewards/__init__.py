"""Verifiers and reward functions, and the scorer that runs them safely."""

from .. import __version__ as __version__
