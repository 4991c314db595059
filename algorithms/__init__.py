"""One file = one algorithm; shared pure maths beside them.

To add one: write the file, then name it here. From outside the repository, `algorithm.type: my_module:MyMethod`
does the same without touching it.
"""

from importlib import import_module

from .. import __version__ as __version__
from ..engine.errors import ConfigError
from .amft import Amft
from .base import AlgorithmBase, AlgorithmConfig, Setup
from .bread import Bread
from .chord import Chord
from .ghpo import Ghpo
from .grpo import Grpo
from .hpt import Hpt
from .luffy import Luffy
from .one_token_rollout import OneTokenRollout
from .polychromic import Polychromic
from .ppo import Ppo
from .prefix_rft import PrefixRft
from .regft import Regft
from .relift import Relift
from .rift import Rift
from .sasr import Sasr
from .sft import Sft
from .srft import Srft
from .stages import Stages
from .super_rl import SuperRl
from .topr import Topr
from .uft import Uft
from .visurf import Visurf

ALGORITHMS: dict[str, type[AlgorithmBase]] = {
    "amft": Amft,
    "bread": Bread,
    "chord": Chord,
    "ghpo": Ghpo,
    "grpo": Grpo,
    "hpt": Hpt,
    "luffy": Luffy,
    "one_token_rollout": OneTokenRollout,
    "polychromic": Polychromic,
    "ppo": Ppo,
    "prefix_rft": PrefixRft,
    "regft": Regft,
    "relift": Relift,
    "rift": Rift,
    "sasr": Sasr,
    "sft": Sft,
    "srft": Srft,
    "stages": Stages,
    "super_rl": SuperRl,
    "topr": Topr,
    "uft": Uft,
    "visurf": Visurf,
}


def resolve(name: str) -> type[AlgorithmBase]:
    """The class of a registered name, or of `module:Class`.

    Raises ConfigError at algorithm.type naming the value and what exists.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    path = "algorithm.type"
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise ConfigError.at(
            path, name, f"no such algorithm; choose {', '.join(ALGORITHMS)}, or module:Class"
        )
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ConfigError.at(path, name, f"cannot import {module_name!r}: {error}") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, AlgorithmBase)):
        raise ConfigError.at(
            path, name, f"{module_name!r} has no class {class_name!r} derived from AlgorithmBase"
        )
    return found


__all__ = ["ALGORITHMS", "AlgorithmBase", "AlgorithmConfig", "Setup", "resolve"]
