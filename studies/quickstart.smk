# The quickstart: noisy gold-labelled pairs, a proxy reward model, direct alignment three ways, best-of-n under reward
# models that saw only 1,000 of the pairs, PPO on one reward model, on five and held at thresholds, one report.
# Every stage is a plain train.py command; finished stages are not rerun; `--executor slurm` takes the same file to a cluster.
import json
import sys

OUT = config.get("out", "runs/quickstart")
SEED = int(config.get("seed", 0))
TRAIN = f"{sys.executable} train.py"
RUN = lambda name: f"{OUT}/{name}/version_0/hf/config.json"
LOSSES = {
    "dpo_small_beta": "configs/dpo.yaml --config configs/hardware/cpu.yaml --model.loss.beta 0.02",
    "dpo_large_beta": "configs/dpo.yaml --config configs/hardware/cpu.yaml --model.loss.beta 0.2",
    "rpo": "configs/rpo.yaml --config configs/hardware/cpu.yaml",
}

FEW = {
    "reward_ensemble": "configs/reward_ensemble.yaml --model.init_args.mode full --model.init_args.lora null"
    " --model.optimizer.lr 3e-3 --trainer.max_epochs 5",
    "reward_moe": "configs/reward_moe.yaml",
}

PPO = {
    "ppo": "configs/ppo.yaml --model.init_args.rewards.proxy.init_args.path {proxy}",
    "ppo_ensemble": "configs/ppo_ensemble.yaml",
    "ppo_xi": "configs/ppo_xi.yaml",
}


rule all:
    input:
        f"{OUT}/report.html",


rule pairs:
    output:
        f"{OUT}/pairs.jsonl",
    log:
        f"{OUT}/logs/pairs.log",
    shell:
        "{TRAIN} label {output} --noise 0.25 --n 8000 --seed {SEED} > {log} 2>&1 && touch {OUT}/logs/pairs.done"


rule reward:
    input:
        rules.pairs.output,
    output:
        RUN("reward"),
    log:
        f"{OUT}/logs/reward.log",
    shell:
        "OMP_NUM_THREADS=1 {TRAIN} fit --config configs/reward.yaml --config configs/hardware/cpu.yaml --data.init_args.train {input} --seed_everything {SEED}"
        " --trainer.logger.init_args.save_dir {OUT} --trainer.logger.init_args.version 0 > {log} 2>&1 && touch {OUT}/logs/reward.done"


rule align:
    priority: 1  # the longest ones first, so that no core waits at the end
    input:
        pairs=rules.pairs.output,
        proxy=rules.reward.output,
    output:
        f"{OUT}/{{loss}}/version_0/hf/config.json",
    wildcard_constraints:
        loss="|".join(LOSSES),
    log:
        f"{OUT}/logs/{{loss}}.log",
    params:
        config=lambda w: LOSSES[w.loss],
        proxy=lambda w, input: str(input.proxy).removesuffix("/config.json"),
    shell:
        "OMP_NUM_THREADS=1 {TRAIN} fit --config {params.config} --data.init_args.train {input.pairs} --seed_everything {SEED}"
        " --data.init_args.gold lit_rlhf.data.synthetic.WorldGold"
        " --model.init_args.proxy lit_rlhf.models.scorers.HFRewardModel --model.init_args.proxy.init_args.path {params.proxy}"
        " --trainer.logger.init_args.save_dir {OUT} --trainer.logger.init_args.name {wildcards.loss}"
        " --trainer.logger.init_args.version 0 > {log} 2>&1 && touch {OUT}/logs/{wildcards.loss}.done"


rule ppo:
    input:
        rules.reward.output,
    output:
        f"{OUT}/{{ppo}}/version_0/hf/config.json",
    wildcard_constraints:
        ppo="|".join(PPO),
    log:
        f"{OUT}/logs/{{ppo}}.log",
    params:
        config=lambda w, input: PPO[w.ppo].format(proxy=str(input).removesuffix("/config.json")),
    shell:
        "OMP_NUM_THREADS=1 {TRAIN} fit --config {params.config} --config configs/hardware/cpu.yaml --seed_everything {SEED}"
        " --trainer.max_steps 480 --trainer.logger.init_args.save_dir {OUT} --trainer.logger.init_args.name {wildcards.ppo}"
        " --trainer.logger.init_args.version 0 > {log} 2>&1 && touch {OUT}/logs/{wildcards.ppo}.done"


rule few:
    input:
        rules.pairs.output,
    output:
        f"{OUT}/{{kind}}/version_0/hf/reward.json",
    wildcard_constraints:
        kind="|".join(FEW),
    log:
        f"{OUT}/logs/{{kind}}.log",
    params:
        config=lambda w: FEW[w.kind],
    shell:
        "OMP_NUM_THREADS=1 {TRAIN} fit --config {params.config} --config configs/hardware/cpu.yaml --data.init_args.train {input}"
        " --data.init_args.limit 1000 --seed_everything {SEED} --trainer.logger.init_args.save_dir {OUT}"
        " --trainer.logger.init_args.name {wildcards.kind} --trainer.logger.init_args.version 0 > {log} 2>&1"
        " && touch {OUT}/logs/{wildcards.kind}.done"


rule bon:
    input:
        [f"{OUT}/{kind}/version_0/hf/reward.json" for kind in FEW],
    output:
        touch(f"{OUT}/logs/bon.done"),
    log:
        f"{OUT}/logs/bon.log",
    params:
        rewards=lambda w, input: json.dumps(
            {
                name: {
                    "class_path": f"lit_rlhf.models.{scorer}",
                    "init_args": {"path": path.removesuffix("/reward.json"), "batch_size": 256} | more,
                }
                for path, (name, scorer, more) in zip(
                    input,
                    [
                        ("members", "scorers.EnsembleRewardModel", {"raw": True}),
                        ("dmoerm", "moe_scorer.MoERewardModel", {}),
                    ],
                )
            }
        ),
        selectors=json.dumps(
            {
                "single": {"reward": "members", "by": "each_member"},
                "mean": {"reward": "members", "by": "lit_rlhf.functional.aggregation.Mean"},
                "wco": {"reward": "members", "by": "lit_rlhf.functional.aggregation.WorstCase"},
                "uwo": {
                    "reward": "members",
                    "by": {
                        "class_path": "lit_rlhf.functional.aggregation.UncertaintyWeighted",
                        "init_args": {"coefficient": 0.5},
                    },
                },
                "dmoerm": {"reward": "dmoerm", "by": "total"},
            }
        ),
    shell:
        "rm -rf {OUT}/bon && OMP_NUM_THREADS=1 {TRAIN} bon --config configs/bon.yaml --n_samples 128 --seed {SEED} --out {OUT}/bon"
        " --rewards '{params.rewards}' --selectors '{params.selectors}' > {log} 2>&1"


rule report:
    input:
        [RUN(name) for name in [*LOSSES, *PPO]],
        rules.bon.output,
    output:
        f"{OUT}/report.html",
    params:
        runs=" ".join(f"{OUT}/{name}/version_0" for name in [*LOSSES, *PPO, "bon"]),
    log:
        f"{OUT}/logs/report.log",
    shell:
        "{TRAIN} report {params.runs} -o {output} > {log} 2>&1 && touch {OUT}/logs/report.done"
