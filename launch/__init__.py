"""The command line, config, composition, Ray, recipes: the only folder that sees all the others."""

from .. import __version__ as __version__
