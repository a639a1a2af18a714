"""Makes the blank models of the built-in world, and stores trained ones in half precision; `make world` calls it.

python -m lit_rlhf.world_models blank policy FOLDER SEED
python -m lit_rlhf.world_models half FOLDER FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from lit_rlhf.data.synthetic import build_tokenizer

SIZES = {
    "policy": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
    "proxy": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
}
WINDOW = 128


def blank(kind: str, folder: str, seed: int) -> None:
    """Write an untrained Llama of the world's vocabulary: a policy, or a proxy reward model of its smaller size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape: dict[str, Any] = SIZES[kind]
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=WINDOW, tie_word_embeddings=True, **special, **shape
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def half(source: str, target: str) -> None:
    """Copy a model folder with its weights rounded to 16 bits and no path of this machine in its files."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target, dirs_exist_ok=True)
    weights = Path(target) / "model.safetensors"
    save_file({k: v.to(torch.float16) for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    for name in ("config.json", "tokenizer_config.json"):
        path = Path(target) / name
        content = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("_name_or_path", "name_or_path")}
        path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "blank":
        blank(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        half(sys.argv[2], sys.argv[3])
