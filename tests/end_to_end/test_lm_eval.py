"""lm-evaluation-harness loads an export: on a local task its answers are those of the weights that were trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plait.algorithms import Setup
from plait.algorithms.chord import Chord, ChordConfig
from plait.engine.config import LearnerConfig
from plait.engine.learner import LearnerWorker, Rank
from plait.engine.types import Sampling

ABSENT = "lm-eval is not installed: pip install --no-deps -r requirements/lm-eval.txt"
PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
QUESTIONS = ("2 + 2 =", "3 + 5 =", "7 - 3 =", "9 + 9 =")
TOKENS = 8


def export(model: Path, folder: Path) -> Any:
    """The model with changed weights, exported as a run exports it; returns it as transformers reads it."""
    import torch
    from transformers import AutoModelForCausalLM

    algorithm = Chord(ChordConfig(), Setup(Sampling(16)))
    args = (LearnerConfig(), algorithm.losses, algorithm.needs, Rank(), None, 0)
    worker = LearnerWorker(str(model), *args)
    with torch.no_grad():
        for i, parameter in enumerate(worker.engine.module.parameters()):
            torch.manual_seed(i)
            parameter.add_(0.2 * torch.randn_like(parameter))
    worker.export(str(folder))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_it_answers_a_local_task(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    harness = pytest.importorskip("lm_eval", reason=ABSENT)
    tasks = pytest.importorskip("lm_eval.tasks", reason=ABSENT)
    from transformers import AutoTokenizer

    monkeypatch.chdir(tmp_path)
    model = export(tiny_model, tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    said = []
    for question in QUESTIONS:
        turn = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        answer = out[0, ids["input_ids"].shape[1] :]
        said.append(tokenizer.decode(answer, skip_special_tokens=True).split("\n")[0])

    assert all(said), "it says something"
    rows = [{"question": q, "answer": s} for q, s in zip(QUESTIONS, said, strict=True)]
    rows[0]["answer"] += " and more"  # one of them is wrong
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    task = PAGE.read_text().split("```yaml\n", 1)[1].split("```", 1)[0]
    (tmp_path / "tasks" / "questions.yaml").write_text(task)
    found = harness.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'export'},dtype=float32",
        tasks=["questions"],
        task_manager=tasks.TaskManager(
            include_path=str(tmp_path / "tasks"), include_defaults=False
        ),
        apply_chat_template=True,
        device="cpu",
        gen_kwargs={"max_gen_toks": TOKENS},
        bootstrap_iters=0,
    )
    answers = [sample["resps"][0][0] for sample in found["samples"]["questions"]]
    assert answers == said
    assert found["results"]["questions"]["exact_match,none"] == 0.75
