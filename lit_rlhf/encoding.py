"""Text to ids and masks, in one place: training, scoring, sampling and probes all meet the same tokens.

Prompt and response are tokenised apart and their ids concatenated, everywhere, so that no token straddles the boundary
and a sampled response continues exactly the prompt that was trained on. The rules:

1. A string prompt is followed by the joiner. The joiner's trailing spaces go to the response, because byte-pair
   vocabularies attach a space to the word after it; the rest goes to the prompt. An empty prompt takes no joiner.
2. A message list is rendered by the tokenizer's chat template with its generation prompt, and the response is what the
   template adds for the assistant's turn. Without a template, each turn is a line `role: content`.
3. What the tokenizer puts in front of a text (BOS) stands once at the start; under a chat template the template
   decides. A prompt without any token starts with BOS, or else EOS, since a first token needs something to follow.
4. The response ends with one stop token: where the text has one, nothing after it counts; where it has none, EOS is
   added. A response that does not fit the window is cut at its end and loses EOS. Prompts are never cut silently.
5. Masks come from lengths, never from ids, so that pad may equal EOS.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from lit_rlhf.assets import resolve
from lit_rlhf.types import Prompt, Sequences, UserError

DEFAULT_LENGTH = 1024
_PROBE = "a"  # any text shows what a tokenizer puts in front of texts


@dataclass(frozen=True)
class Encoded:
    """A prompt and its response as one row of ids.

    Args:
        ids: prompt ids, then response ids, usually ending in a stop token.
        prompt_length: ids that belong to the prompt; at least 1.
        truncated: whether the window, or a stop token inside the text, cut something off the response.
    """

    ids: tuple[int, ...]
    prompt_length: int
    truncated: bool = False

    @property
    def response_length(self) -> int:
        """Response tokens, the end token included."""
        return len(self.ids) - self.prompt_length


class Encoder:
    """Turns prompts and responses into ids, and ids back into text.

    Args:
        tokenizer: a `transformers` tokenizer with an end token.
        joiner: text between a string prompt and its response.
        max_length: the window, in tokens, for prompt and response together; >= 2.
        keep_end: cut prompts that fill the window to their last `max_length // 2` tokens (and BOS). The cut depends on
            the prompt alone, so that training and sampling agree. By default such prompts have no encoding.
        stop_ids: further tokens that end a response.

    Raises:
        UserError: no end token, or a window too small for one prompt and one response token.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        joiner: str = " ",
        max_length: int = DEFAULT_LENGTH,
        keep_end: bool = False,
        stop_ids: Iterable[int] = (),
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no eos_token, so no response could ever end")
        if max_length < 2:
            raise UserError(f"max_length must be >= 2 (one prompt and one response token), got {max_length}")
        self.tokenizer = tokenizer
        self.joiner = joiner
        self.max_length = max_length
        self.keep_end = keep_end
        self.eos_id: int = tokenizer.eos_token_id
        self.stop_ids: tuple[int, ...] = tuple(sorted({self.eos_id, *stop_ids}))
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._prefix = _leading_ids(tokenizer)
        self._gap = joiner[len(joiner.rstrip(" ")) :]

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        joiner: str = " ",
        max_length: int | None = None,
        keep_end: bool = False,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load the tokenizer, stop tokens and window of a model folder, hub id or `builtin:` name.

        Args:
            path: where the model is.
            joiner: see the class.
            max_length: None takes the model's window, at most 1024.
            keep_end: see the class.
            trust_remote_code: allow code that the model's author wrote to run here.

        Raises:
            UserError: nothing loadable there, or `max_length` is larger than the model's window.
        """
        tokenizer, config, generation = _load(path, trust_remote_code=trust_remote_code)
        window = _window(tokenizer, config)
        if max_length is not None and window is not None and max_length > window:
            raise UserError(f"max_length {max_length} is larger than the window of {path!r}, {window} tokens")
        return cls(
            tokenizer,
            joiner=joiner,
            max_length=max_length or min(window or DEFAULT_LENGTH, DEFAULT_LENGTH),
            keep_end=keep_end,
            stop_ids=_stop_ids(config) | _stop_ids(generation),
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether message lists go through a template of the tokenizer, and not through plain `role: content` lines."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the ids of a prompt, the same in training and in sampling."""
        return self.prompts([prompt])[0]

    def prompts(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Return the ids of many prompts in one call of the tokenizer."""
        texts = [self._prompt_text(prompt) for prompt in prompts]
        ids = self._ids(texts)
        return [self._framed(ids[text], prompt) for text, prompt in zip(texts, prompts, strict=True)]

    def questions(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        """Encode what a router reads: every turn of the user, a line each, cut to its end where it fills the window."""
        texts = [user_turns(prompt) for prompt in prompts]
        ids = self._ids(texts)
        room = self.max_length - len(self._prefix) - 1
        rows = [(*self._prefix, *ids[text][-room:], self.eos_id) for text in texts]
        return [Encoded(row, len(row) - 1) for row in rows]

    def encode(self, prompt: Prompt, response: str) -> Encoded | None:
        """Encode one prompt with one response; None where the prompt alone fills the window."""
        return self.encode_many([prompt], [response])[0]

    def encode_many(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Encoded | None]:
        """Encode many rows in two calls of the tokenizer; each entry as `encode` gives it."""
        texts = [self._response_text(p, r) for p, r in zip(prompts, responses, strict=True)]
        ids = self._ids(texts)
        heads = self.prompts(prompts)
        return [self._joined(head, ids[text]) for head, text in zip(heads, texts, strict=True)]

    def response_text(self, ids: Sequence[int]) -> str:
        """Return the text of response ids up to the first stop token, without special tokens and the joiner."""
        end = self._stop(ids)
        text: str = self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.removeprefix(self._gap)

    def collate(self, rows: Sequence[Encoded]) -> Sequences:
        """Pad rows on the right: [N, L] of the longest row, masks from the lengths."""
        width = max(len(row.ids) for row in rows)
        ids = torch.tensor([[*row.ids, *[self.pad_id] * (width - len(row.ids))] for row in rows])
        column = torch.arange(width)
        attention = column < torch.tensor([[len(row.ids)] for row in rows])
        after_prompt = column >= torch.tensor([[row.prompt_length] for row in rows])
        return Sequences(ids, attention, attention & after_prompt)

    def collate_prompts(self, prompts: Sequence[Prompt]) -> Sequences:
        """Pad prompts on the left: [N, P] of the longest prompt; no response tokens yet."""
        rows = self.prompts(prompts)
        width = max(len(row) for row in rows)
        ids = torch.tensor([[*[self.pad_id] * (width - len(row)), *row] for row in rows])
        attention = torch.arange(width) >= torch.tensor([[width - len(row)] for row in rows])
        return Sequences(ids, attention, torch.zeros_like(attention))

    def _prompt_text(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt + self.joiner[: len(self.joiner) - len(self._gap)] if prompt else ""
        if self.has_chat_template:
            return str(self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
        return "".join(f"{turn['role']}:{self._gap}{turn['content']}\n" for turn in prompt) + "assistant:"

    def _response_text(self, prompt: Prompt, response: str) -> str:
        if not prompt:
            return response
        if isinstance(prompt, str) or not self.has_chat_template:
            return self._gap + response
        turns = [*prompt, {"role": "assistant", "content": response}]
        whole = str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        before = self._prompt_text(prompt)
        # A template that renders the turns before the answer anew, once the answer is there, has no suffix to take.
        return whole.removeprefix(before) if whole.startswith(before) else response

    def _ids(self, texts: Sequence[str]) -> dict[str, list[int]]:
        unique = list(dict.fromkeys(texts))
        if not unique:
            return {}
        ids = self.tokenizer(unique, add_special_tokens=False, verbose=False)["input_ids"]
        return dict(zip(unique, ids, strict=True))

    def _framed(self, ids: Sequence[int], prompt: Prompt) -> tuple[int, ...]:
        templated = not isinstance(prompt, str) and self.has_chat_template
        bare = templated or tuple(ids[: len(self._prefix)]) == self._prefix
        whole = tuple(ids) if bare else (*self._prefix, *ids)
        if self.keep_end and len(whole) >= self.max_length:
            start = self._prefix if whole[: len(self._prefix)] == self._prefix else ()
            return (*start, *whole[-(self.max_length // 2) :])[: self.max_length - 1]
        bos = self.tokenizer.bos_token_id
        return whole or (self.eos_id if bos is None else bos,)

    def _joined(self, prompt: Sequence[int], response: Sequence[int]) -> Encoded | None:
        room = self.max_length - len(prompt)
        if room < 1:
            return None
        end = self._stop(response)
        closed = [*response[:end], *(response[end : end + 1] or [self.eos_id])]
        rest = response[end + 1 :]
        lost = bool(self.tokenizer.decode(rest).strip()) if rest else False
        return Encoded((*prompt, *closed[:room]), len(prompt), truncated=lost or len(closed) > room)

    def _stop(self, ids: Sequence[int]) -> int:
        """Return where the first stop token is, or the end."""
        return next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))


def user_turns(prompt: Prompt) -> str:
    """Return what the user said in all turns, a line each; a string prompt is the user's as a whole."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(turn["content"] for turn in prompt if turn["role"] == "user")


def _leading_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return what the tokenizer puts in front of every text: usually BOS or nothing."""
    bare = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    full = tokenizer(_PROBE)["input_ids"]
    start = next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)
    return tuple(full[:start])


def _load(path: str, *, trust_remote_code: bool) -> tuple[Any, Any, Any]:
    """Return tokenizer, model config and generation config; the configs may be None."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = str(Path(path).expanduser()) if path.startswith("~") else resolve(path)
    if (Path(folder).is_absolute() or folder.startswith(".")) and not Path(folder).is_dir():
        raise UserError(f"{path!r} is no folder; expected a model folder, a hub id, or a `builtin:` name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises a dozen kinds for the same mistake
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no tokenizer could be loaded from {path!r}; expected a model folder or a reachable hub id ({reason})"
        ) from error
    configs: list[Any] = []
    for kind, options in ((AutoConfig, {"trust_remote_code": trust_remote_code}), (GenerationConfig, {})):
        try:
            configs.append(kind.from_pretrained(_base(folder), **options))
        except (OSError, ValueError, KeyError):
            configs.append(None)  # a tokenizer alone
    return tokenizer, configs[0], configs[1]


def _base(folder: str) -> str:
    """Return where the configuration is: an adapter folder, and a model of several parts, name their base."""
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("reward.json", "base")):
        path = Path(folder) / file
        if path.is_file():
            base = str(json.loads(path.read_text(encoding="utf-8")).get(key) or "")
            inside = Path(folder) / base
            return str(inside) if inside.is_dir() else base
    return folder


def _window(tokenizer: Any, config: Any) -> int | None:
    """Return the number of positions of a model; None where nothing bounds it."""
    text = config.get_text_config() if config is not None else None
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        size = getattr(text, name, None)
        if isinstance(size, int) and size > 0:
            return size
    limit = tokenizer.model_max_length
    return int(limit) if limit is not None and limit < 10**9 else None  # transformers says 1e30 for "unknown"


def _stop_ids(config: Any) -> set[int]:
    found = getattr(config, "eos_token_id", None)
    if found is None:
        return set()
    return {found} if isinstance(found, int) else set(found)
