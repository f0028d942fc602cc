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
        "python -m prefopt --threads {threads} --gpus {resources.gpu} pretrain --text {input.text} --recipe"
        " {params.recipe:q}"
        " --work work/{wildcards.task}/pretrain --out {output.model} --metrics {output.metrics} > {log} 2>&1"


rule fetch:
    output:
        model=directory("results/models/{task}/fetched_{part}"),
    log:
        "logs/{task}/fetch_{part}.log",
    benchmark:
        "logs/benchmarks/{task}/fetch_{part}.jsonl"
    wildcard_constraints:
        part="base|sft|true_reward",
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        name=lambda wildcards: config["tasks"][wildcards.task][wildcards.part]["name"],
        kind=lambda wildcards: ("classifier" if wildcards.part == "true_reward" else "causal_lm"),
        revision=revision_argument,
        code=fingerprint("prefopt.lm.fetch"),
    shell:
        "python -m prefopt fetch --name {params.name:q} --kind {params.kind} {params.revision:q} --out {output.model}"
        " > {log} 2>&1"


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
        folder=os.path.relpath(f"{workflow.basedir}/workflow/models/tldr_base"),
        code=fingerprint("prefopt.training.model_card"),
    shell:
        "mkdir -p {params.folder:q} && cp -v {input.model}/* {params.folder:q} > {log} 2>&1"
        " && python -m prefopt model_card --model {input.model} --out {params.folder:q}/README.md >> {log} 2>&1"
