# The trained parts of the built-in world, from seeds alone: the policy by SFT, five proxy reward models by their seeds.
# `make world` writes them into the package, where the `builtin:` names find them.
import sys

ASSETS = config.get("assets", "lit_rlhf/assets")
OUT = config.get("out", "runs/world")
TRAIN = f"OMP_NUM_THREADS=1 {sys.executable} train.py"
PROXIES = range(int(config.get("proxies", 5)))


rule all:
    input:
        f"{ASSETS}/policy/model.safetensors",
        [f"{ASSETS}/proxy-{i}/model.safetensors" for i in PROXIES],


rule blank:
    output:
        directory(f"{OUT}/blank-{{kind}}-{{seed}}"),
    shell:
        "{sys.executable} -m lit_rlhf.world_models blank {wildcards.kind} {output} {wildcards.seed}"


rule policy:
    input:
        f"{OUT}/blank-policy-0",
    output:
        f"{ASSETS}/policy/model.safetensors",
    log:
        f"{OUT}/logs/policy.log",
    shell:
        "{TRAIN} fit --config studies/world/policy.yaml --config configs/hardware/cpu.yaml --model.init_args.model_name_or_path {input}"
        " --trainer.logger.init_args.save_dir {OUT} --trainer.logger.init_args.version 0 > {log} 2>&1"
        " && {sys.executable} -m lit_rlhf.world_models half {OUT}/policy/version_0/hf $(dirname {output})"


rule proxy:
    input:
        f"{OUT}/blank-proxy-{{i}}",
    output:
        f"{ASSETS}/proxy-{{i}}/model.safetensors",
    log:
        f"{OUT}/logs/proxy-{{i}}.log",
    shell:
        "{TRAIN} fit --config studies/world/proxy.yaml --config configs/hardware/cpu.yaml --model.init_args.model_name_or_path {input} --seed_everything {wildcards.i}"
        " --trainer.logger.init_args.save_dir {OUT} --trainer.logger.init_args.name proxy-{wildcards.i}"
        " --trainer.logger.init_args.version 0 > {log} 2>&1"
        " && {sys.executable} -m lit_rlhf.world_models half {OUT}/proxy-{wildcards.i}/version_0/hf $(dirname {output})"
