"""A teacher behind an OpenAI-compatible HTTP interface, as a source of rollouts.

Only text comes back: rollouts have no token ids and no log-probs.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..engine.errors import ConfigError, RolloutError
from ..engine.types import FinishReason, Rollout, RolloutRequest
from .worker import sample_seed

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_NO_KEY = "none"
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class Endpoint:
    """`generate` asks for one sample a call, at most `max_concurrency` at a time.

    The key is read from the environment variable `api_key_env`; a server without keys needs none. 429, 5xx and broken
    connections are tried again `max_retries` times, with growing pauses.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        max_concurrency: int = 16,
        timeout_seconds: float = 300.0,
        max_retries: int = 5,
        seed: int = 0,
    ) -> None:
        if api_key_env is not None and api_key_env not in os.environ:
            raise ConfigError.at("--api-key-env", api_key_env, "no such environment variable")
        self.model = model
        self.base_url = base_url
        self._key = os.environ[api_key_env] if api_key_env else _NO_KEY
        self._max_concurrency = max_concurrency
        self._timeout = timeout_seconds
        self._max_retries = max_retries
        self._seed = seed

    def generate(self, requests: Sequence[RolloutRequest], *, step: int) -> Iterator[Rollout]:
        """Yield every requested rollout once, as it arrives. Raises RolloutError naming the prompt that failed."""
        results: queue.Queue[Rollout | BaseException | None] = queue.Queue()
        stopped = threading.Event()
        thread = threading.Thread(
            target=self._run,
            args=(requests, step, results, stopped),
            name="plait-endpoint",
            daemon=True,
        )
        thread.start()
        longest = self._timeout * (self._max_retries + 2)
        try:
            while (result := results.get(timeout=longest)) is not None:
                if isinstance(result, BaseException):
                    raise result
                yield result
        except queue.Empty:
            raise RolloutError(f"{self.base_url}: no answer for {longest:g} s") from None
        finally:
            stopped.set()  # where the reader gave up, nothing more is asked

    def wait_started(self, stop_token_ids: Sequence[int] = ()) -> None:
        """As the pool of workers; a server that is not there shows at the first sample."""

    def _run(
        self,
        requests: Sequence[RolloutRequest],
        step: int,
        results: queue.Queue,
        stopped: threading.Event,
    ) -> None:
        try:
            asyncio.run(self._ask_all(requests, step, results, stopped))
        except BaseExceptionGroup as group:
            results.put(group.exceptions[0])
        except BaseException as error:  # noqa: BLE001  (it is raised again where `generate` is read)
            results.put(error)
        else:
            results.put(None)

    async def _ask_all(
        self,
        requests: Sequence[RolloutRequest],
        step: int,
        results: queue.Queue,
        stopped: threading.Event,
    ) -> None:
        from openai import AsyncOpenAI

        room = asyncio.Semaphore(self._max_concurrency)
        async with (
            AsyncOpenAI(
                base_url=self.base_url,
                api_key=self._key,
                timeout=self._timeout,
                max_retries=self._max_retries,
            ) as client,
            asyncio.TaskGroup() as tasks,
        ):
            for request in requests:
                for index in range(request.first_index, request.first_index + request.n):
                    sample = self._ask(client, room, request, index, step, results, stopped)
                    tasks.create_task(sample)

    async def _ask(
        self,
        client: AsyncOpenAI,
        room: asyncio.Semaphore,
        request: RolloutRequest,
        index: int,
        step: int,
        results: queue.Queue,
        stopped: threading.Event,
    ) -> None:
        from openai import OpenAIError

        prompt, sampling = request.prompt, request.sampling
        if request.prefix:
            raise RolloutError(f"prompt {prompt.prompt_id}: an endpoint cannot continue a prefix")
        messages: Any = [dict(message) for message in prompt.messages]
        async with room:
            if stopped.is_set():
                return
            try:
                reply = await client.chat.completions.create(
                    model=self.model,
                    messages=messages,
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=sample_seed(self._seed, step, prompt.prompt_id, index) % 2**31,
                )
            except OpenAIError as error:
                raise RolloutError(
                    f"prompt {prompt.prompt_id}: {self.base_url} with model {self.model!r}: {error}"
                ) from error
        if not reply.choices:
            raise RolloutError(f"prompt {prompt.prompt_id}: {self.base_url} sent no choice")
        choice = reply.choices[0]
        finish = _FINISH.get(choice.finish_reason, "abort")
        text = choice.message.content or ""
        results.put(Rollout(prompt.prompt_id, index, (), 0, (), 0, finish, text))
