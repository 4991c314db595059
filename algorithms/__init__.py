"""One file = one algorithm; shared pure maths beside them."""

from .. import __version__ as __version__
