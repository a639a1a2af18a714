# DMoERM, its ablations, and single reward models on the same labels; every seed by itself, tested on clean pairs.
# python -m snakemake --snakefile studies/dmoerm.smk --cores 2 --config seeds="[71, 72, 73, 74, 75]" out=runs/dmoerm
import sys

OUT = config.get("out", "runs/dmoerm")
SEEDS = config.get("seeds", [0])
PAIRS = int(config.get("pairs", 8000))
TRAIN = f"OMP_NUM_THREADS=1 {sys.executable} train.py"
MOE, ONE = "configs/reward_moe.yaml", "configs/reward.yaml"
LORA = (
    "--model.init_args.lora.r 297 --model.init_args.lora.alpha 297"  # as many trained weights as DMoERM has
    " --model.init_args.lora.target_modules all-linear --model.optimizer.lr 1e-3"
)
MODELS = {  # name: labels, arguments
    "dmoerm": ("pairs", f"--config {MOE}"),
    "no_outer": ("pairs", f"--config {MOE} --data.init_args.outer one"),
    "no_task_phase": ("pairs", f"--config {MOE} --data.init_args.epochs.task 0"),
    "no_capability_phase": ("pairs", f"--config {MOE} --data.init_args.epochs.capability 0"),
    "single_same_labels": ("all_labels", f"--config {ONE} --trainer.max_epochs 1 {LORA}"),
    "single_pairs": ("pairs", f"--config {ONE}"),
}


rule all:
    input:
        [f"{OUT}/seed{seed}/accuracy.json" for seed in SEEDS],


rule pairs:
    output:
        f"{OUT}/seed{{seed}}/pairs.jsonl",
    shell:
        "{TRAIN} label {output} --noise 0.25 --n {PAIRS} --seed {wildcards.seed} > /dev/null"


rule test_pairs:
    output:
        f"{OUT}/test.jsonl",
    shell:
        "{TRAIN} label {output} --noise 0 --n 2000 --split test --seed 1000 > /dev/null"


rule all_labels:
    input:
        rules.pairs.output,
    output:
        f"{OUT}/seed{{seed}}/all_labels.jsonl",
    shell:
        "{sys.executable} -m studies.dmoerm labels {input} {output}"


rule model:
    input:
        lambda w: f"{OUT}/seed{w.seed}/{MODELS[w.model][0]}.jsonl",
    output:
        touch(f"{OUT}/seed{{seed}}/{{model}}.done"),
    wildcard_constraints:
        model="|".join(MODELS),
    log:
        f"{OUT}/seed{{seed}}/{{model}}.log",
    params:
        arguments=lambda w: MODELS[w.model][1],
    shell:
        "{TRAIN} fit {params.arguments} --config configs/hardware/cpu.yaml --data.init_args.train {input}"
        " --seed_everything {wildcards.seed} --trainer.logger.init_args.save_dir {OUT}/seed{wildcards.seed}"
        " --trainer.logger.init_args.name {wildcards.model} --trainer.logger.init_args.version 0 > {log} 2>&1"


rule accuracy:
    input:
        rules.test_pairs.output,
        [f"{OUT}/seed{{seed}}/{model}.done" for model in MODELS],
    output:
        f"{OUT}/seed{{seed}}/accuracy.json",
    shell:
        "OMP_NUM_THREADS=1 {sys.executable} -m studies.dmoerm accuracy {OUT}/test.jsonl {output} {OUT}/seed{wildcards.seed}"
