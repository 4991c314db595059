"""The catalogue of faults: what is injected, what is expected, and which figure a test has to show.

`make faults` runs every row and writes docs/reliability.md from what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    injected: str
    expected: str
    figure: str
    """What is measured, with its target."""


FAULTS = {
    "F1": Fault(
        "SIGKILL of an idle rollout worker",
        "detected, restarted, re-synced, the step completes",
        "detected <= 5 s, lost samples 0",
    ),
    "F2": Fault(
        "SIGKILL of a rollout worker while it generates",
        "its samples are asked for again, once",
        "duplicates 0, lost 0",
    ),
    "F3": Fault(
        "SIGKILL of a learner rank in the backward pass",
        "all ranks restart from the checkpoint, rollouts are kept",
        "steps redone <= interval, final bits equal",
    ),
    "F4": Fault(
        "SIGKILL of the learner between optimizer step and weight sync",
        "no double step, versions count up by one",
        "version gaps 0, double steps 0",
    ),
    "F5": Fault(
        "SIGKILL of the driver, the same job submitted again",
        "the run resumes",
        "bits equal, orphans 0",
    ),
    "F6": Fault(
        "a node with a rollout worker is removed",
        "the others go on, it rejoins when it is back",
        "goodput / ((n-1)/n) >= 0.9",
    ),
    "F7": Fault(
        "the node of a learner rank is removed",
        "restart on another node, or an end with the reason",
        "decided <= 60 s",
    ),
    "F8": Fault(
        "the head node is killed, a new one started, the job submitted again",
        "the run resumes",
        "steps lost <= interval",
    ),
    "F9": Fault(
        "SIGSTOP of a rollout worker or a learner rank",
        "found, fenced, replaced; a woken one is not heard",
        "detected <= timeout + 1 s, late writes 0",
    ),
    "F10": Fault(
        "a learner rank sleeps inside a collective",
        "the error names rank, operation and step",
        "error <= timeout + 5 s",
    ),
    "F11": Fault(
        "a receiver is killed after weight bucket k, for every k",
        "no worker ever serves mixed weights",
        "samples of a wrong version 0",
    ),
    "F12": Fault(
        "SIGKILL at each failpoint of a checkpoint",
        "the previous or the new checkpoint loads",
        "k of k resumable, silent fallbacks 0",
    ),
    "F13": Fault(
        "100 flipped bits, cut and deleted files",
        "detected before use, fall back to the previous checkpoint",
        "detected 100/100, false alarms 0/20",
    ),
    "F14": Fault(
        "disk full, file size limit, failing writes",
        "clear error, nothing half-written stays, the previous checkpoint is intact",
        "previous valid, leftover bytes 0",
    ),
    "F15": Fault(
        "checkpoint folder missing, not writable or slow",
        "refused before the first step",
        "error <= 5 s, steps wasted 0",
    ),
    "F16": Fault(
        "interrupted at steps 1..N, every algorithm",
        "the resumed run equals the uninterrupted one",
        "max abs difference 0, prompts repeated or skipped 0",
    ),
    "F17": Fault(
        "resumed with another number of ranks or ZeRO stage",
        "same parameters",
        "difference after load 0, next loss <= 1e-6",
    ),
    "F18": Fault(
        "resumed with changed config, data, tokenizer or model",
        "refused with the difference",
        "12/12 refused, harmless ones accepted",
    ),
    "F19": Fault(
        "SIGTERM, `ray job stop`, Ctrl-C, twice Ctrl-C",
        "checkpoint within the grace period, own exit code",
        "steps lost 0",
    ),
    "F20": Fault(
        "ten minutes of random kills",
        "the run ends with the same bits",
        "effective training time >= 0.80",
    ),
    "F21": Fault(
        "rewards that loop, sleep or never end in a regex or in sympy",
        "only their own sample times out",
        "pool after = before, healthy p99 <= 2x",
    ),
    "F22": Fault(
        "rewards that eat memory, fork, crash, exit or print 100 MB", "contained", "survivors 100 %"
    ),
    "F23": Fault(
        "math-verify off the main thread and in asyncio",
        "works or fails aloud",
        "silent zeros 0/200, agreement 200/200",
    ),
    "F24": Fault(
        "rewards that return None, NaN, inf, text",
        "UNKNOWN, counted; over budget the run stops",
        "NaN in a loss 0",
    ),
    "F25": Fault(
        "broken rows of data of every kind",
        "counted by reason; strict mode stops",
        "rows accounted for 100 %, steps crashed 0",
    ),
    "F26": Fault(
        "demonstrations that are empty, too long, without end, cut to nothing",
        "masked right or refused",
        "trained tokens on prompts or padding 0",
    ),
    "F27": Fault(
        "all rewards of a group, or of a batch, are equal",
        "a step without signal, counted",
        "NaN 0, stalled steps 0",
    ),
    "F28": Fault(
        "NaN or inf in a loss or gradient, on one rank only too",
        "the update is skipped on all ranks; after K the run stops",
        "changed bits 0, ranks apart 0",
    ),
    "F29": Fault(
        "a hostile pickle in every file that a run loads", "never executed", "canaries fired 0"
    ),
    "F30": Fault(
        "models with remote code, links and .. in paths",
        "refused",
        "code imported 0, paths escaped 0",
    ),
    "F31": Fault(
        "calls without or with a wrong token to every port",
        "refused; loopback only",
        "accepted 0, listeners elsewhere 0",
    ),
    "F32": Fault(
        "secrets in environment and config",
        "absent from logs, checkpoints, job list and process list",
        "hits 0",
    ),
    "F33": Fault(
        "300 steps of a tiny model",
        "memory, object store, descriptors and threads stay flat",
        "<= 0.05 MB a step, descriptors +0",
    ),
    "F34": Fault(
        "small object store, slow learner", "back-pressure, no spilling, no deadlock", "peak <= cap"
    ),
    "F35": Fault(
        "after every kill above",
        "no process, port, shared memory or temporary file is left",
        "leftovers 0 within 10 s",
    ),
    "F36": Fault(
        "two jobs in one run folder; a stale lock",
        "the second is refused; a stale lock is taken over",
        "corruptions 0/20",
    ),
    "F37": Fault(
        "results that come late, twice or out of order", "each is used once", "trained twice 0"
    ),
    "F38": Fault(
        "100 invalid recipes",
        "refused before any worker starts, the field named",
        "caught 100 %, <= 3 s each",
    ),
    "F39": Fault(
        "vLLM cannot start, one role out of memory, port in use, model missing",
        "one clear error and exit code",
        "orphans 0",
    ),
    "F40": Fault(
        "clock jump, other hash seed, other number of threads", "no effect on results", "bits equal"
    ),
}
