"""What takes seconds to import, for the process that small runs are forked from; nothing here starts a thread pool."""

import deepspeed  # noqa: F401
import rows  # noqa: F401

import plait.algorithms.chord
import plait.engine.critic
import plait.engine.learners
import plait.engine.model  # noqa: F401
