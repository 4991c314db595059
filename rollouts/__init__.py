"""vLLM workers, the pool that feeds them, prompts and demonstrations, chat templates."""

from .. import __version__ as __version__
