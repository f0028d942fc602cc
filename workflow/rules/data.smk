# Raw records -> raw tables -> tokenized tables.


rule records:
    output:
        demonstrations="results/data/{task}/raw/demonstrations.parquet",
        preferences="results/data/{task}/raw/preferences.parquet",
        pretraining="results/data/{task}/raw/pretraining.parquet",
    log:
        "logs/{task}/records.log",
    benchmark:
        "logs/benchmarks/{task}/records.jsonl"
    wildcard_constraints:
        task=one_of(plan.tasks_of(config, "comparison", "transfer")),
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("records"),
        content=brought(record_files),
        code=fingerprint("prefopt.data.records"),
    shell:
        "python -m prefopt records --task {wildcards.task} --recipe {params.recipe:q}"
        " --out-dir results/data/{wildcards.task}/raw > {log} 2>&1"


rule prepare:
    input:
        demonstrations="results/data/{task}/raw/demonstrations.parquet",
        preferences="results/data/{task}/raw/preferences.parquet",
        base=model_files("base"),
    output:
        demonstrations="results/data/{task}/demonstrations.parquet",
        preferences="results/data/{task}/preferences.parquet",
        gold_preferences="results/data/{task}/gold_preferences.parquet",
        prompts="results/data/{task}/prompts.parquet",
        summary="results/data/{task}/summary.json",
    log:
        "logs/{task}/prepare.log",
    benchmark:
        "logs/benchmarks/{task}/prepare.jsonl"
    wildcard_constraints:
        task=one_of(plan.tasks_of(config, "comparison", "transfer")),
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **model("base", "base"),
        **recipe("prepare"),
        code=fingerprint("prefopt.data.prepare"),
    shell:
        "python -m prefopt prepare --raw-dir results/data/{wildcards.task}/raw --model {params.base:q}"
        " --recipe {params.recipe:q} --out-dir results/data/{wildcards.task} > {log} 2>&1"
