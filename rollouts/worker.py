"""One rollout worker: a Ray actor around vLLM's `AsyncLLM`, whose engine runs in a process of its own.

The class is plain; `pool.py` makes it an actor. All methods but the constructor are coroutines, so that many samples,
one request each, are in flight at once. vLLM is imported in `start`, never by importing this module.

What holds for every sample: its seed depends on (run seed, step, prompt id, index) and never on the worker; all the
tokens that one call draws come from one policy version; its prefix cache entries are salted by weight update, so that
keys and values of older weights are never read. After a failed weight update the worker refuses to generate.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..engine.errors import RolloutError, WeightSyncError, WorkerLost
from ..engine.processes import Place, die_with_parent
from ..engine.types import FinishReason, Rollout, Sampling, TokenIds
from .config import RolloutConfig
from .engine_process import ACTOR_PID, EngineLog, engine_args, max_model_len

_BEAT_SECONDS = 0.5
_ABORT_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Begun:
    """Generated tokens of an unfinished sample, after its prefix, and the policy version of the first."""

    token_ids: TokenIds
    logprobs: tuple[float, ...]
    policy_version: int


@dataclass(frozen=True, slots=True)
class SampleTask:
    """One sample to draw.

    >>> SampleTask("sums/0", 3, (17, 10, 17), (), Sampling(max_tokens=8), seed=5).index
    3
    """

    prompt_id: str
    index: int
    prompt: TokenIds
    prefix: TokenIds
    sampling: Sampling
    """max_tokens bounds the whole response, forced prefix included."""
    seed: int
    stop_token_ids: TokenIds = ()
    begun: Begun | None = None
    """What is there of it already."""

    def __str__(self) -> str:
        return f"prompt {self.prompt_id} (index {self.index})"


@dataclass(frozen=True, slots=True)
class WorkerProof:
    """contracts.ServedProof of one worker. logprobs[i] belong to tokens 1.. of probe i."""

    worker: str
    version: int
    checksums: Mapping[str, str]
    stale: tuple[str, ...]
    logprobs: tuple[tuple[float, ...], ...]


def sample_seed(run_seed: int, step: int, prompt_id: str, index: int) -> int:
    """63-bit seed of one sample, the same on every machine and in every process."""
    key = f"{run_seed}/{step}/{index}/{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1


class RolloutWorker:
    def __init__(
        self,
        name: str,
        model_path: str,
        config: RolloutConfig,
        dtype: str,
        version: int = 0,
    ) -> None:
        """`version` is the policy version of the weights in the folder `model_path`."""
        self._name = name
        self._model_path = model_path
        self._config = config
        self._dtype = dtype
        self._max_model_len = max_model_len(config)
        self._version = version
        self._updates = 0
        self._requests = 0
        self._open: set[str] = set()
        """Ids of the requests that vLLM works on."""
        self._refusal = f"rollout worker {name} has not been started"
        self._log = EngineLog()
        self._engine: Any = None
        self._tokenizer: Any = None
        self._engine_dead: tuple[type[Exception], ...] = ()
        """What vLLM raises once its process has ended."""

    async def start(self) -> None:
        """Load the model and warm up. Raises RolloutError with the cause that vLLM logged."""
        die_with_parent()
        os.environ[ACTOR_PID] = str(os.getpid())
        try:
            with self._log.captured():
                from vllm import AsyncEngineArgs
                from vllm.v1.engine.async_llm import AsyncLLM
                from vllm.v1.engine.exceptions import EngineDeadError

                engine = AsyncLLM.from_engine_args(
                    AsyncEngineArgs(**engine_args(self._model_path, self._config, self._dtype))
                )
        except Exception as error:
            cause = self._log.cause() or f"{type(error).__name__}: {error}"
            raise RolloutError(
                f"rollout worker {self._name} could not start on {self._model_path}: {cause}"
            ) from error
        self._engine = engine
        self._tokenizer = engine.get_tokenizer()
        self._engine_dead = (EngineDeadError,)
        self._refusal = ""

    async def generate(self, task: SampleTask) -> Rollout:
        """Draw one sample, or the rest of one. Raises RolloutError; cancelling the call aborts it in the engine.

        After `interrupt` the sample is as far as it came, with finish_reason "abort".
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        begun, known = (
            ((), ()) if task.begun is None else (task.begun.token_ids, task.begun.logprobs)
        )
        budget = task.sampling.max_tokens - len(task.prefix) - len(begun)
        length = len(task.prompt) + task.sampling.max_tokens
        if budget < 1 or length > self._max_model_len:
            raise RolloutError(
                f"prompt {task.prompt_id}: {len(task.prompt)} prompt tokens, a forced prefix of {len(task.prefix)} "
                f"and max_tokens = {task.sampling.max_tokens} do not fit: the prefix must leave room for one token, "
                f"and prompt plus max_tokens be at most {self._max_model_len} (rollouts.max_*_length)"
            )
        version = self._version
        params = SamplingParams(
            max_tokens=budget,
            temperature=task.sampling.temperature,
            top_p=task.sampling.top_p,
            seed=task.seed,
            stop_token_ids=list(task.stop_token_ids),
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        context = (*task.prompt, *task.prefix, *begun)
        output = (await self._request(context, params, str(task))).outputs[0]
        if output.finish_reason not in ("stop", "length", "abort"):
            raise RolloutError(
                f"prompt {task.prompt_id}: vLLM ended the request with {output.finish_reason!r}"
            )
        generated = tuple(output.token_ids)
        drawn = tuple(
            entry[token].logprob
            for entry, token in zip(output.logprobs or (), generated, strict=True)
        )
        tokens = (*task.prefix, *begun, *generated)
        return Rollout(
            prompt_id=task.prompt_id,
            index=task.index,
            token_ids=tokens,
            prefix_len=len(task.prefix),
            logprobs=(*known, *drawn),
            policy_version=version,
            finish_reason=cast(FinishReason, output.finish_reason),
            text=self._tokenizer.decode(tokens, skip_special_tokens=True),
        )

    async def interrupt(self) -> None:
        """End all samples in flight where they are."""
        while self._open:
            await self._engine.abort(list(self._open))
            await asyncio.sleep(_ABORT_SECONDS)  # one that vLLM does not know yet is ended next

    async def prove(self, version: int, probes: Sequence[Sequence[int]]) -> WorkerProof:
        """Evidence of what is served; a worker at another version answers so at once, without computing the rest.

        WorkerLost after a weight update that was not finished, and when vLLM's process is dead.
        """
        if self._refusal:
            raise WorkerLost(self._refusal)
        if self._version != version or self._updates == 0:
            return WorkerProof(self._name, self._version, {}, (), ())
        try:
            ranks = await self._engine.collective_rpc("prove_served_weights")
        except self._engine_dead as error:
            raise self._dead() from error
        stale = {name: None for rank in ranks for name in rank["stale"]}
        for rank in ranks[1:]:  # tensor parallel ranks must all have received the same
            both = {*rank["checksums"].items()} ^ {*ranks[0]["checksums"].items()}
            stale |= dict.fromkeys(name for name, _ in both)
        return WorkerProof(
            worker=self._name,
            version=self._version,
            checksums=ranks[0]["checksums"],
            stale=tuple(stale),
            logprobs=tuple([await self._probe_logprobs(tuple(probe)) for probe in probes]),
        )

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        with self._update_step("init_weight_transfer_engine"):
            await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info))

    async def start_weight_update(self) -> None:
        """Begin a weight update. RolloutError while samples are in flight: they would mix two policies.

        WorkerLost after an update that was not finished: what it left behind cannot be updated.
        """
        if self._open:
            raise RolloutError(
                f"rollout worker {self._name} still draws {len(self._open)} samples; "
                "drain the pool before a weight sync"
            )
        if self._refusal:
            raise WorkerLost(self._refusal)
        # Until the update is finished nothing is served, whatever goes wrong in between.
        self._refusal = (
            f"rollout worker {self._name} did not finish a weight update; its weights are undefined"
        )
        with self._update_step("start_weight_update"):
            await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        with self._update_step("update_weights"):
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info))

    async def finish_weight_update(self, weight_version: str) -> None:
        with self._update_step("finish_weight_update"):
            await self._engine.finish_weight_update(weight_version)
        self._version = int(weight_version)
        self._updates += 1
        self._refusal = ""

    async def place(self) -> Place:
        return Place.here()

    async def beat(self) -> None:
        """Answers when both this process and vLLM's do; WorkerLost when vLLM's is dead."""
        answer = asyncio.ensure_future(self._engine.collective_rpc("beat"))
        try:
            # vLLM leaves a call unanswered whose process died meanwhile.
            while not (await asyncio.wait({answer}, timeout=_BEAT_SECONDS))[0]:
                if self._engine.errored:
                    raise self._dead()
            answer.result()
        except self._engine_dead as error:
            raise self._dead() from error
        finally:
            answer.cancel()

    def _dead(self) -> WorkerLost:
        cause = self._log.cause() or "its EngineCore process was killed"
        return WorkerLost(f"vLLM died in rollout worker {self._name}: {cause}")

    async def _request(self, tokens: TokenIds, params: Any, what: str) -> Any:
        """Run one request to its end, or to `interrupt`; `what` is its name in errors."""
        from vllm.v1.engine.exceptions import EngineGenerateError

        with self._drawing() as name:
            prompt = {
                "prompt_token_ids": list(tokens),
                "cache_salt": f"update {self._updates}",
            }
            outputs = self._engine.generate(prompt, params, name)
            try:
                return [output async for output in outputs][-1]
            except self._engine_dead as error:
                raise self._dead() from error
            except (EngineGenerateError, ValueError) as error:
                cause = error.__cause__ or error  # an EngineGenerateError has no text of its own
                raise RolloutError(
                    f"vLLM failed in rollout worker {self._name} at {what}: {cause!r}"
                ) from error

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[str]:
        """The name of a request in flight; WorkerLost where the weights are not fit to draw with."""
        if self._refusal:
            raise WorkerLost(self._refusal)
        self._requests += 1
        name = str(self._requests)
        self._open.add(name)
        try:
            yield name
        finally:
            self._open.discard(name)

    async def _probe_logprobs(self, probe: TokenIds) -> tuple[float, ...]:
        """Served log-probs of tokens 1.. of a sequence; never read from the prefix cache."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if not 2 <= len(probe) < self._max_model_len:
            raise RolloutError(
                f"a probe must have 2 to {self._max_model_len - 1} tokens, this one has {len(probe)}"
            )
        params = SamplingParams(
            max_tokens=1,
            prompt_logprobs=0,
            skip_reading_prefix_cache=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        scored = (await self._request(probe, params, "a probe of the weights")).prompt_logprobs
        return tuple(scored[place][probe[place]].logprob for place in range(1, len(probe)))

    @contextlib.contextmanager
    def _update_step(self, step: str) -> Iterator[None]:
        """vLLM reports failures of its worker process as plain Exception; say where, and as what."""
        try:
            yield
        except self._engine_dead as error:
            raise self._dead() from error
        except Exception as error:
            raise WeightSyncError(f"rollout worker {self._name}, {step}: {error}") from error
