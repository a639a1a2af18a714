"""DPO side by side with TRL: pairs per processor second and peak memory, interleaved in one run, as ratios.

python benchmarks/dpo.py [ROUNDS]

Both sides train one 4-layer, width-256 Llama on the same pairs (32 to 256 tokens), 8 pairs a step, AdamW, fp32, with
one thread and a live reference. Machines are noisy, so only the ratio of the two is a result.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

WORDS, PAIRS, BATCH, WARMUP, STEPS = 8000, 256, 8, 2, 10


def prepare(folder: Path) -> None:
    """Write the model, its tokenizer and the pairs."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(WORDS))])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    rng = np.random.default_rng(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(PAIRS):
            prompt, chosen, rejected = (" ".join(f"w{w}" for w in rng.integers(WORDS, size=n)) for n in lengths(rng))
            file.write(json.dumps({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}) + "\n")


def lengths(rng: np.random.Generator) -> list[int]:
    """Draw prompt and response lengths: pairs of 32 to 256 tokens."""
    prompt = int(rng.integers(16, 65))
    return [prompt, *(int(n) for n in rng.integers(16, 193, size=2))]


def ours(folder: Path) -> list[float]:
    """Train by lit_rlhf; return processor seconds of each step."""
    from lightning import Callback, Trainer

    from lit_rlhf.data import PreferenceData
    from lit_rlhf.functional.preference import DPO
    from lit_rlhf.modules import PreferenceModule

    class Clock(Callback):
        def __init__(self) -> None:
            self.ticks: list[float] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.ticks.append(time.process_time())

    clock = Clock()
    data = PreferenceData(str(folder), train=str(folder / "pairs.jsonl"), batch_size=BATCH, validation_fraction=0)
    trainer = Trainer(
        accelerator="cpu", max_steps=WARMUP + STEPS, callbacks=[clock], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(PreferenceModule(loss=DPO(beta=0.1), model_name_or_path=str(folder)), data)
    return clock.ticks


def trl(folder: Path) -> list[float]:
    """Train by TRL's DPOTrainer; return processor seconds of each step."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ticks: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ticks.append(time.process_time())

    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        arguments = DPOConfig(
            output_dir=out, per_device_train_batch_size=BATCH, max_steps=WARMUP + STEPS, beta=0.1, max_length=512,
            gradient_checkpointing=False, bf16=False, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
            logging_steps=1,
        )  # fmt: skip
        rows = load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=out)
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(folder), args=arguments, train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    return clock.ticks


def side(name: str, folder: Path) -> None:
    """Run one side in this process and print its figures as JSON."""
    import torch

    torch.set_num_threads(1)
    ticks = {"ours": ours, "trl": trl}[name](folder)[WARMUP - 1 :]
    seconds = statistics.median(b - a for a, b in pairwise(ticks))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT " + json.dumps({"pairs": BATCH / seconds, "gib": memory}))


def main() -> None:
    """Alternate the two sides and print the ratios."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    found: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for _ in range(rounds):
            for who, results in found.items():
                environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                command = [sys.executable, __file__, "--side", who, name]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                results.append(json.loads(done.stdout.rpartition("RESULT ")[2].splitlines()[0]))
                print(f"{who:5} {results[-1]['pairs']:.2f} pairs a processor second, peak {results[-1]['gib']:.2f} GiB")
    medians = {who: {k: statistics.median(r[k] for r in results) for k in results[0]} for who, results in found.items()}
    print(f"speed, ours / TRL: {medians['ours']['pairs'] / medians['trl']['pairs']:.2f}")
    print(f"memory, ours / TRL: {medians['ours']['gib'] / medians['trl']['gib']:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
