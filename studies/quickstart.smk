# The quickstart: noisy gold-labelled pairs, a proxy reward model, direct alignment three ways, one report.
# Every stage is a plain train.py command; finished stages are not rerun; `--executor slurm` takes the same file to a cluster.
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


rule report:
    input:
        [RUN(name) for name in LOSSES],
    output:
        f"{OUT}/report.html",
    params:
        runs=" ".join(f"{OUT}/{name}/version_0" for name in LOSSES),
    log:
        f"{OUT}/logs/report.log",
    shell:
        "{TRAIN} report {params.runs} -o {output} > {log} 2>&1 && touch {OUT}/logs/report.done"
