"""Hugging Face TRL as a peer: a trainer in a process of its own, which takes an optimizer step when it is told to.

    python peer_trl.py grpo|learner|sft MODEL WORK.json --head stock|compact

It runs in TRL's own environment (make peer-trl) and imports nothing of plait. On standard input, each line asks for one
step; the answer is a line of JSON with what was trained. WORK.json holds the prompts (grpo: conversations) or the rows
({"prompt": ids, "response": ids, "advantage": number}). `learner` is GRPOTrainer fed with stored rollouts.

`--head compact` projects trained positions only, as TRL does where Triton runs; on a CPU it projects all of them. That
is a change of one condition in TRL, not a setting of it.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

ENDLESS = 10**6
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["grpo", "learner", "sft"])
    parser.add_argument("model")
    parser.add_argument("work")
    parser.add_argument("--head", choices=["stock", "compact"], default="stock")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--response-tokens", type=int, default=32)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    if options.head == "compact":
        import trl.trainer.utils

        trl.trainer.utils._use_triton = lambda device: True
    with open(options.work) as file:
        work = json.load(file)
    seen: list[list[int]] = []
    trainer = (
        make_sft(options, work, seen) if options.kind == "sft" else make_grpo(options, work, seen)
    )
    trainer.add_callback(Turns(answers, seen))
    trainer.train()


class Turns(TrainerCallback):
    """Takes a step when asked, and answers with the rows that it trained."""

    def __init__(self, answers: Any, seen: list[list[int]]) -> None:
        self.answers, self.seen = answers, seen
        self.is_ready = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.is_ready:
            self.is_ready = True
            self.answer({"ready": True})
        if not sys.stdin.readline():
            os._exit(0)  # nobody asks any more; there is nothing to save

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.answer({"rows": self.seen})
        self.seen.clear()

    def answer(self, message: dict[str, Any]) -> None:
        self.answers.write(json.dumps(message) + "\n")
        self.answers.flush()


def settings(num_rows: int) -> dict[str, Any]:
    """What TRL needs to be fast here: bfloat16 weights and optimizer states, one micro-batch, no recomputation."""
    return {
        "output_dir": "build/peer-trl",
        "use_cpu": True,
        "max_steps": ENDLESS,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "per_device_train_batch_size": num_rows,
        "max_grad_norm": 1.0,
    }


def load(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="sdpa"
    )


def make_sft(options: Any, rows: list[Row], seen: list[list[int]]) -> Any:
    import trl

    class Trainer(trl.SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs["attention_mask"].bool()
            seen.extend(row[m].tolist() for row, m in zip(inputs["input_ids"], mask, strict=True))
            return super().compute_loss(model, inputs, *args, **kwargs)

    data = [
        {
            "input_ids": row["prompt"] + row["response"],
            "labels": [-100] * len(row["prompt"]) + row["response"],
        }
        for row in rows
    ]
    return Trainer(
        model=load(options.model),
        args=trl.SFTConfig(**settings(len(rows)), max_length=None),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )


def make_grpo(options: Any, work: list[Any], seen: list[list[int]]) -> Any:
    """`work`: conversations, or stored rows in groups."""
    import trl

    stored = stored_batch(work) if options.kind == "learner" else None

    class Trainer(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            if stored is None:
                return super()._generate_and_score_completions(inputs)
            return dict(stored)

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            prompts, completions = inputs["prompt_ids"], inputs["completion_ids"]
            masks = inputs["prompt_mask"].bool(), inputs["completion_mask"].bool()
            for i in range(len(prompts)):
                prompt = prompts[i][masks[0][i]].tolist()
                completion = completions[i][masks[1][i]].tolist()
                # What is sampled differs; what was asked for does not.
                seen.append(prompt + ([len(completion)] if stored is None else completion))
            return super()._compute_loss(model, inputs)

    num_prompts = len(work) if stored is None else len(work) // options.group_size
    prompts = work if stored is None else [[{"role": "user", "content": "x"}]] * num_prompts
    config = trl.GRPOConfig(
        **settings(num_prompts * options.group_size),
        num_generations=options.group_size,
        max_completion_length=options.response_tokens,
        temperature=1.0,
        beta=0.0,
        shuffle_dataset=False,
        generation_kwargs={"min_new_tokens": options.response_tokens},
    )
    return Trainer(
        model=load(options.model),
        args=config,
        reward_funcs=digits,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )


def digits(completions: list[Any], **_: Any) -> list[float]:
    """Any number that differs within a group."""
    texts = [completion[-1]["content"] for completion in completions]
    return [sum(map(ord, text)) % 97 / 97 for text in texts]


def stored_batch(rows: list[Row]) -> dict[str, Any]:
    """Prompts padded on the left, responses on the right, as TRL lays them out."""
    width = max(len(row["prompt"]) for row in rows), max(len(row["response"]) for row in rows)
    batch: dict[str, Any] = {
        "prompt_ids": torch.tensor(
            [[2] * (width[0] - len(r["prompt"])) + r["prompt"] for r in rows]
        ),
        "prompt_mask": torch.tensor(
            [[0] * (width[0] - len(r["prompt"])) + [1] * len(r["prompt"]) for r in rows]
        ),
        "completion_ids": torch.tensor(
            [r["response"] + [2] * (width[1] - len(r["response"])) for r in rows]
        ),
        "completion_mask": torch.tensor(
            [[1] * len(r["response"]) + [0] * (width[1] - len(r["response"])) for r in rows]
        ),
        "advantages": torch.tensor([float(r["advantage"]) for r in rows]),
    }
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    return batch


if __name__ == "__main__":
    main()
