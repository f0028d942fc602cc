# The base model: from scratch, or from a hub. A shipped one or a local folder needs no rule.


rule pretrain:
    input:
        text="results/data/{task}/raw/pretraining.parquet",
    output:
        model=directory("results/models/{task}/base"),
        metrics="results/training/{task}/pretrain.jsonl",
    log:
        "logs/{task}/pretrain.log",
    benchmark:
        "logs/benchmarks/{task}/pretrain.jsonl"
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("pretrain"),
    params:
        **recipe("pretrain"),
        code=fingerprint("prefopt.training.pretrain"),
    shell:
        model_stage(
            "pretrain --text {input.text} --recipe {params.recipe} --work {work}/{wildcards.task}/pretrain"
            " --out {output.model} --metrics {output.metrics}"
        )


rule fetch:
    output:
        model=directory("results/models/{task}/fetched_{part}"),
    log:
        "logs/{task}/fetch_{part}.log",
    benchmark:
        "logs/benchmarks/{task}/fetch_{part}.jsonl"
    wildcard_constraints:
        part="base|sft|true_reward|reward_model|gold_reward_model",
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        name=lambda wildcards: config["tasks"][wildcards.task][wildcards.part]["name"],
        kind=lambda wildcards: "causal_lm" if wildcards.part in ("base", "sft") else "classifier",
        revision=revision_argument,
        code=fingerprint("prefopt.lm.fetch"),
    shell:
        table_stage("fetch --name {params.name} --kind {params.kind} {params.revision} --out {output.model}")


# Not part of `all`: `snakemake --cores 2 shipped_base` makes the checkpoint in the repository again.
rule shipped_base:
    input:
        model="results/models/tldr/base",
    log:
        "logs/tldr/shipped_base.log",
    benchmark:
        "logs/benchmarks/tldr/shipped_base.jsonl"
    localrule: True
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        folder=SHIPPED_BASE,
        code=fingerprint("prefopt.training.model_card"),
    shell:
        quoted("mkdir -p {params.folder} && cp {input.model}/* {params.folder} && ")
        + table_stage("model_card --model {input.model} --out {params.folder}/README.md")
