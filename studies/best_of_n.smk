# Best-of-n under a weak reward model: 1,000 noisy pairs, five members, one policy's samples, every seed by itself.
# python -m snakemake --snakefile studies/best_of_n.smk --cores 2 --config seeds="[61, 62, 63, 64, 65]" out=runs/best_of_n
import json
import sys

OUT = config.get("out", "runs/best_of_n")
SEEDS = config.get("seeds", [0])
TRAIN = f"OMP_NUM_THREADS=1 {sys.executable} train.py"


rule all:
    input:
        [f"{OUT}/seed{seed}/bon.done" for seed in SEEDS],


rule pairs:
    output:
        f"{OUT}/seed{{seed}}/pairs.jsonl",
    shell:
        "{TRAIN} label {output} --noise 0.25 --n 1000 --seed {wildcards.seed} > /dev/null"


rule members:
    input:
        rules.pairs.output,
    output:
        f"{OUT}/seed{{seed}}/reward_ensemble/version_0/hf/reward.json",
    log:
        f"{OUT}/seed{{seed}}/reward_ensemble.log",
    shell:
        "{TRAIN} fit --config configs/reward_ensemble.yaml --config configs/hardware/cpu.yaml"
        " --model.init_args.mode full --model.init_args.lora null --model.optimizer.lr 3e-3 --trainer.max_epochs 5"
        " --data.init_args.train {input} --seed_everything {wildcards.seed}"
        " --trainer.logger.init_args.save_dir {OUT}/seed{wildcards.seed} --trainer.logger.init_args.version 0 > {log} 2>&1"


rule curves:
    input:
        rules.members.output,
    output:
        touch(f"{OUT}/seed{{seed}}/bon.done"),  # the command makes its own run folder
    log:
        f"{OUT}/seed{{seed}}/bon.log",
    params:
        rewards=lambda w, input: json.dumps(
            {
                "proxies": {
                    "class_path": "lit_rlhf.models.scorers.EnsembleRewardModel",
                    "init_args": {"path": str(input).removesuffix("/reward.json"), "raw": True, "batch_size": 256},
                }
            }
        ),
    shell:
        "rm -rf {OUT}/seed{wildcards.seed}/bon && {TRAIN} bon --config configs/bon.yaml --rewards '{params.rewards}' --seed {wildcards.seed}"
        " --out {OUT}/seed{wildcards.seed}/bon > {log} 2>&1"
