"""Fresh processes whose start is measured: each prints the moment (time.monotonic) it was ready, and ends.

python first_step.py train RECIPE      ready: the first step begins
python first_step.py resume RUN        ready: the second step begins, the first one is in the checkpoint
python first_step.py load MODEL        ready: transformers and vLLM have loaded the model, nothing else
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

MARK = "ready at"


def ready(*_: Any) -> None:
    print(MARK, time.monotonic(), flush=True)
    raise SystemExit(0)


def first_step(resume: bool, target: str) -> None:
    from plait.launch.config import load_recipe
    from plait.launch.run import load_run, train

    more = ["loop.steps=2"]
    recipe = load_run(Path(target), more) if resume else load_recipe(target)
    from plait.engine import loop

    loop.take_step = ready
    train(recipe, resume=resume, overwrite=not resume, named=["loop.steps"])


def load(model: str) -> None:
    from plait.rollouts.config import RolloutConfig
    from plait.rollouts.engine_process import engine_args, environment

    config = RolloutConfig(max_prompt_length=48, max_response_length=12, kv_cache_gib=0.1)
    os.environ |= environment(config)
    from transformers import AutoModelForCausalLM
    from vllm import LLM

    engine = LLM(**engine_args(model, config, "float32"))
    AutoModelForCausalLM.from_pretrained(model)
    try:
        ready()
    finally:
        del engine


if __name__ == "__main__":
    what, target = sys.argv[1:]
    if what == "load":
        load(target)
    else:
        first_step(what == "resume", target)
