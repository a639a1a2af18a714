# PPO without a KL penalty against one reward model and against the worst case of five, with a small penalty, and held at
# thresholds; every seed has another of the shipped reward models as its single one.
# python -m snakemake --snakefile studies/ppo.smk --cores 2 --config seeds="[81, 82, 83, 84, 85]" out=runs/ppo_study
import sys

OUT = config.get("out", "runs/ppo_study")
SEEDS = config.get("seeds", [0])
TRAIN = f"OMP_NUM_THREADS=1 {sys.executable} train.py"
RUNS = {
    "single": "configs/ppo.yaml --model.init_args.rewards.proxy.init_args.path builtin:proxy-{proxy}",
    "wco": "configs/ppo_ensemble.yaml",
    "wco_kl": "configs/ppo_ensemble.yaml --model.init_args.kl.init_args.coefficient 0.1",
    "xi": "configs/ppo_xi.yaml",
}


rule all:
    input:
        [f"{OUT}/{run}/seed{seed}.done" for run in RUNS for seed in SEEDS],


rule train:
    output:
        touch(f"{OUT}/{{run}}/seed{{seed}}.done"),
    wildcard_constraints:
        run="|".join(RUNS),
    log:
        f"{OUT}/{{run}}/seed{{seed}}.log",
    params:
        config=lambda w: RUNS[w.run].format(proxy=int(w.seed) % 5),
    shell:
        "{TRAIN} fit --config {params.config} --config configs/hardware/cpu.yaml --seed_everything {wildcards.seed}"
        " --trainer.logger.init_args.save_dir {OUT}/{wildcards.run} --trainer.logger.init_args.name seed{wildcards.seed}"
        " --trainer.logger.init_args.version 0 > {log} 2>&1"
