"""Asks a judge many questions at once, patiently, through the `openai` client."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from lit_rlhf.errors import UserError
from lit_rlhf.judge.answers import Answer, BrokenAnswerError, parse
from lit_rlhf.judge.options import JudgeOptions
from lit_rlhf.judge.progress import Progress

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

KEY = "OPENAI_API_KEY"
AGAIN = (408, 409, 425, 429)  # and everything from 500: the server may yet answer
REFUSED = (400, 413, 422)  # this one question, for example since it is too long
HOPELESS = ("insufficient_quota", "invalid_api_key", "model_not_found")  # error codes, whatever the status
SHORT = 4  # characters under which a key is a placeholder and may be part of any word
SHOWN = 300  # characters of what a server complains
LONGEST = 60.0  # seconds between two tries, unless the server asks for more

Request = tuple[str, dict[str, Any]]


def ask(requests: Iterator[Request], options: JudgeOptions, keep: Callable[[str, Answer], None], run: Progress) -> None:
    """Ask every question, `options.concurrency` at a time, and hand each answer to `keep` as it arrives.

    Questions without an answer after all tries, and those the server refuses, are counted in `run` and left out.

    Raises:
        UserError: nobody answers there, the key, the model or the address is wrong, or too many questions in a row
            stay without an answer; refusals count while nothing was answered, in this run or before.
    """
    asker = Asker(options, keep, run)
    try:
        asyncio.run(asker.work(requests))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        run.show()


class _RefusedError(Exception):
    """A question that the server will not take."""


class Asker:
    """The state that the workers share: the key to hide, failures in a row, and until when the server wants peace."""

    def __init__(self, options: JudgeOptions, keep: Callable[[str, Answer], None], run: Progress) -> None:
        self.options, self.keep, self.run = options, keep, run
        self.secret = os.environ.get(KEY, "").strip()
        if not self.secret.isascii() or not self.secret.isprintable():
            raise UserError(f"the environment variable {KEY} holds characters that no key has")
        escaped = json.dumps(self.secret)[1:-1]
        self.forms = (escaped.replace("/", "\\/"), escaped, self.secret) if len(self.secret) >= SHORT else ()
        self.in_a_row = 0
        self.peace = 0.0
        self.logprobs = True

    async def work(self, requests: Iterator[Request]) -> None:
        """Start the workers and wait for them; the first error ends all."""
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise UserError("a judge is asked through `openai`; install the extra `judge`, or openai>=2") from error
        # a further try is ours to make: it is counted, shown, and covers answers that are no chat completion
        client = AsyncOpenAI(
            base_url=self.options.url,
            api_key=self.secret or "none",
            timeout=self.options.timeout,
            max_retries=0,
        )
        async with client, asyncio.TaskGroup() as tasks:
            for _ in range(self.options.concurrency):
                tasks.create_task(self._worker(client, requests))

    async def _worker(self, client: AsyncOpenAI, requests: Iterator[Request]) -> None:
        for key, body in requests:
            well = self.run.answered + self.run.before > 0  # a server that answers others means this question alone
            try:
                answer, failed = await self._answer(client, body), True
            except _RefusedError:
                answer, failed = None, not well
            if answer is not None:
                self.keep(key, answer)
            self.run.count(answer)
            self.in_a_row = 0 if answer is not None else self.in_a_row + failed
            if self.in_a_row >= self.options.max_failures:
                raise UserError(
                    f"judge: {self.in_a_row} questions in a row stayed without an answer, the last one: "
                    f"{self.run.trouble}; what was answered is kept, and the same command goes on from there"
                )

    async def _answer(self, client: AsyncOpenAI, body: dict[str, Any]) -> Answer | None:
        """Return the answer; None if there is none after all tries.

        Raises:
            _RefusedError: the server refuses the question.
        """
        from openai import APIStatusError, OpenAIError

        for attempt in range(self.options.max_retries + 1):
            await self._peace()
            after, plain = 0.0, not (self.options.soft and self.logprobs)
            try:
                return await self._once(client, body)
            except APIStatusError as error:
                trouble, after = self._shown(error), retry_after(error.response.headers.get("retry-after"))
                if not self._worth(error, trouble, plain=plain):
                    self.run.trouble = trouble
                    raise _RefusedError from None
            except OpenAIError as error:
                trouble = self._hidden(f"{error} {error.__cause__ or ''}".strip())
                if not self.run.answered and unreachable(error):
                    raise UserError(f"judge: nobody answers at {self.options.url} ({trouble})") from None
            except TimeoutError:
                trouble = f"no answer within {self.options.timeout:g} s"
            except BrokenAnswerError as error:
                trouble = self._hidden(" ".join(str(error).split()))[:SHOWN]
            self.run.trouble = trouble
            if attempt < self.options.max_retries:
                await self._wait(attempt, after)
        return None

    async def _once(self, client: AsyncOpenAI, body: dict[str, Any]) -> Answer:
        rest = {name: value for name, value in body.items() if self.logprobs or not name.endswith("logprobs")}
        model, messages = rest.pop("model"), rest.pop("messages")
        async with asyncio.timeout(self.options.timeout):  # the client's own timeout starts anew with every byte
            create = client.chat.completions.with_raw_response.create
            raw = await create(model=model, messages=messages, extra_body=rest)
        try:
            answer = parse(json.loads(raw.http_response.text))
        except ValueError as error:
            raise BrokenAnswerError(f"no chat completion: {raw.http_response.text}") from error
        return replace(answer, text=self._hidden(answer.text), finish=answer.finish and self._hidden(answer.finish))

    async def _peace(self) -> None:
        clock = asyncio.get_running_loop().time
        while (left := self.peace - clock()) > 0:  # noqa: ASYNC110  # it may be put off meanwhile
            await asyncio.sleep(left)

    async def _wait(self, attempt: int, after: float) -> None:
        """Wait before the next try: doubling, with jitter; a Retry-After lets all workers wait before theirs."""
        wait = min(LONGEST, self.options.backoff * 2.0**attempt) * random.uniform(0.5, 1.0)  # noqa: S311
        self.peace = max(self.peace, asyncio.get_running_loop().time() + after)
        self.run.retry(max(wait, after))
        await asyncio.sleep(wait)

    def _worth(self, error: APIStatusError, trouble: str, *, plain: bool) -> bool:
        """Tell whether another try may help (True) or the question is refused (False).

        Raises:
            UserError: nothing will help.
        """
        if error.code not in HOPELESS:
            if error.status_code in AGAIN or error.status_code >= 500:
                return True
            if error.status_code in REFUSED and not plain and "logprobs" in trouble:
                self.logprobs = False  # a server that cannot give them; its verdicts still count
                return True
            if error.status_code in REFUSED:
                return False
        raise UserError(f"judge: {self.options.url} answers {trouble}{self._advice(error.status_code)}")

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return f"; expected {'another' if self.secret else 'a'} key in the environment variable {KEY}"
        if status in (400, 404, 405):
            return f"; expected a judge.url that /chat/completions may follow, and a model {self.options.model!r} there"
        return ""

    def _shown(self, error: APIStatusError) -> str:
        return f"{error.status_code}: {self._hidden(' '.join(error.response.text.split()))[:SHOWN]}"

    def _hidden(self, text: str) -> str:
        """Take the key out of a text, should a server repeat it, plain or as JSON writes it."""
        for form in self.forms:
            text = text.replace(form, "[key]")
        return text


def retry_after(value: str | None) -> float:
    """Return the seconds of a Retry-After header, given in seconds or as a date; 0 without one."""
    seconds = 0.0
    with suppress(TypeError, ValueError):
        seconds = (parsedate_to_datetime(value or "") - datetime.now(UTC)).total_seconds()
    with suppress(ValueError):
        seconds = float(value or "")
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def unreachable(error: BaseException) -> bool:
    """Tell whether no connection was made at all, as with a wrong host or port."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    return any(type(cause).__name__ == "ConnectError" for cause in causes)
