# Raw records -> raw tables -> tokenized tables.


rule records:
    input:
        record_files,
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
        recipe=recipe("records"),
        code=fingerprint("prefopt.data.records"),
    shell:
        table_stage(
            "records --task {wildcards.task} --recipe - --out-dir results/data/{wildcards.task}/raw",
            stdin="{params.recipe}",
        )


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
        base=model_folder("base"),
        recipe=recipe("prepare"),
        code=fingerprint("prefopt.data.prepare"),
    shell:
        table_stage(
            "prepare --raw-dir results/data/{wildcards.task}/raw --model {params.base} --recipe {params.recipe}"
            " --out-dir results/data/{wildcards.task}"
        )
