"""Tiny model folders, made once a session; nothing here needs a network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

SENTENCES = (
    "the cat and a dog sat on the mat",
    "a bird sang under the tree then slept because it is good",
    "who ran why you i we think no yes bad rain sunny",
    "please tell me more about time",
)
WORDS = sorted({word for sentence in SENTENCES for word in sentence.split()})


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def word_tokenizer():
    """One token a word; padding, start, end and unknown all distinct; a start token is added, an end token is not."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["</s>", "<s>", "<pad>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_tokenizer():
    """Byte-level BPE as GPT-2 has it: the space belongs to the next word, and one token is start, end and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=end, bos_token=end, eos_token=end, unk_token=end)


def tiny_config(kind: str, tokenizer, **changes):
    """Two layers, width 32, four heads, a window of 64 tokens."""
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig

    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # tiny models with the usual 0.02 say almost nothing
    }
    if kind == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    return {"llama": LlamaConfig, "gpt2": GPT2Config, "neox": GPTNeoXConfig}[kind](**(ids | shape | changes))


@pytest.fixture(scope="session")
def make_model(tmp_path_factory) -> Callable[..., str]:
    """Return a maker of model folders: kind ("llama", "gpt2", "neox"), tokenizer, seed, and changes to the config."""
    from transformers import AutoModelForCausalLM

    def make(kind: str = "llama", tokenizer=None, *, seed: int = 0, config=None, **changes) -> str:
        tokenizer = tokenizer or (word_tokenizer() if kind == "llama" else byte_tokenizer())
        config = config or tiny_config(kind, tokenizer, **changes)
        folder = tmp_path_factory.mktemp(kind)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
            # Biases and norms start at exactly 0 and 1, which would hide mistakes.
            for parameter in model.parameters():
                parameter.data.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def tiny_llama_path(make_model) -> str:
    """A Llama of 40 words; padding, start and end tokens are distinct."""
    return make_model("llama")


@pytest.fixture(scope="session")
def tiny_gpt2_path(make_model) -> str:
    """A GPT-2 with byte-level BPE, learned positions, tied head, dropout in its config, and padding = end token."""
    return make_model("gpt2")


@pytest.fixture(scope="session")
def tiny_neox_path(make_model) -> str:
    """A GPT-NeoX with byte-level BPE and padding = end token."""
    return make_model("neox")


@pytest.fixture
def tmp_folder(tmp_path) -> Path:
    """A folder that does not exist yet."""
    return tmp_path / "out"
