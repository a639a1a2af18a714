# PPO without a KL penalty against one reward model and against the worst case of five, with a small penalty, and held at
# thresholds; every seed has another of the shipped reward models as its single one. `grid` holds nine pairs of thresholds
# beside the search for them; `few` takes the reward models that best_of_n.smk trained from 1,000 pairs, by its seeds.
# python -m snakemake --snakefile studies/ppo.smk --cores 2 --config seeds="[81, 82, 83, 84, 85]" out=runs/ppo_study
# python -m studies.ppo runs/ppo_study
import json
import sys

OUT = config.get("out", "runs/ppo_study")
SEEDS = config.get("seeds", [0])
GRID_SEEDS = config.get("grid_seeds", SEEDS)
TRAIN = f"OMP_NUM_THREADS=1 {sys.executable} train.py"
RUNS = {
    "single": "configs/ppo.yaml --model.init_args.rewards.proxy.init_args.path builtin:proxy-{proxy}",
    "single_kl": "configs/ppo.yaml --model.init_args.rewards.proxy.init_args.path builtin:proxy-{proxy}"
    " --model.init_args.kl.init_args.coefficient 0.1",
    "wco": "configs/ppo_ensemble.yaml",
    "wco_kl": "configs/ppo_ensemble.yaml --model.init_args.kl.init_args.coefficient 0.1",
    "mu": "configs/ppo_mu.yaml",
    "all": "configs/ppo_all.yaml",
    "sat": "configs/ppo_sat.yaml",
    "xi_long": "configs/ppo_xi.yaml --trainer.max_steps 1920",  # three times the config's
    "nelder_mead": "configs/ppo_nelder_mead.yaml",
}
WEAK = config.get("ensembles", "runs/best_of_n")  # where best_of_n.smk trained five members from 1,000 pairs a seed
MEMBERS = f"{WEAK}/seed{{seed}}/reward_ensemble/version_0/hf"
RULES = {"wco": {"class_path": "lit_rlhf.functional.aggregation.WorstCase"}}
RULES["uwo"] = {"class_path": "lit_rlhf.functional.aggregation.UncertaintyWeighted", "init_args": {"coefficient": 0.5}}


def ensemble(rule):
    """Return the rewards of a config: the five members under a rule, as JSON for str.format."""
    arguments = {"path": "MEMBERS", "aggregator": RULES[rule]}
    scorer = {"class_path": "lit_rlhf.models.scorers.EnsembleRewardModel", "init_args": arguments}
    text = json.dumps({"ensemble": scorer}).replace("{", "{{").replace("}", "}}")
    return text.replace("MEMBERS", MEMBERS)


FEW_RUN = "--trainer.max_steps 400 --model.init_args.rewards"
FEW = {
    "few_single": f"configs/ppo.yaml {FEW_RUN}.proxy.init_args.path {MEMBERS}/member-0",
    "few_wco": f"configs/ppo_ensemble.yaml {FEW_RUN} '{ensemble('wco')}'",
    "few_uwo": f"configs/ppo_ensemble.yaml {FEW_RUN} '{ensemble('uwo')}'",
    "few_wco_kl": f"configs/ppo_ensemble.yaml {FEW_RUN} '{ensemble('wco')}' --model.init_args.kl.init_args.coefficient 0.1",
}
THRESHOLDS = ("0.4", "0.8", "1.2")
POINTS = [f"grid_{first}_{second}" for first in THRESHOLDS for second in THRESHOLDS]


def arguments(run, seed):
    """Return the config of a run, and what differs from it."""
    if run not in POINTS:
        return (RUNS | FEW)[run].format(proxy=int(seed) % 5, seed=seed)
    return f"configs/ppo_xi.yaml --config {OUT}/{run}.yaml --trainer.max_steps 400"


rule all:
    input:
        [f"{OUT}/seed{seed}/{run}.done" for run in RUNS for seed in SEEDS],


rule few:  # reward models that differ, since they saw few pairs
    input:
        [f"{OUT}/seed{seed}/{run}.done" for run in FEW for seed in SEEDS],


rule grid:
    input:
        [f"{OUT}/seed{seed}/{point}.done" for point in POINTS for seed in GRID_SEEDS],


rule thresholds:
    output:
        f"{OUT}/grid_{{first}}_{{second}}.yaml",
    run:
        kind = "lit_rlhf.functional.constrained.Equal"
        with open(output[0], "w") as file:
            file.write("model:\n  init_args:\n    constraints:\n")
            for name, value in wildcards.items():
                entry = f"{{name: {name}, threshold: {value}}}"
                file.write(f"      - {{class_path: {kind}, init_args: {entry}}}\n")


rule train:
    input:
        lambda w: f"{OUT}/{w.run}.yaml" if w.run in POINTS else [],
    output:
        touch(f"{OUT}/seed{{seed}}/{{run}}.done"),
    wildcard_constraints:
        run="|".join([*RUNS, *FEW, *POINTS]),
    log:
        f"{OUT}/seed{{seed}}/{{run}}.log",
    params:
        arguments=lambda w: arguments(w.run, w.seed),
    shell:
        "{TRAIN} fit --config {params.arguments} --config configs/hardware/cpu.yaml --seed_everything {wildcards.seed}"
        " --trainer.logger.init_args.save_dir {OUT}/seed{wildcards.seed} --trainer.logger.init_args.name {wildcards.run}"
        " --trainer.logger.init_args.version 0 > {log} 2>&1"
