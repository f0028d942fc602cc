# Raw records -> raw tables -> tokenized tables. What is trained on is read and tokenized apart from the test prompts, and
# the gold judge's pairs apart from all others, so that more of one makes nothing of the other again.


rule records:
    output:
        "results/data/{task}/raw/{table}.parquet",
    log:
        "logs/{task}/records/{table}.log",
    benchmark:
        "logs/benchmarks/{task}/records/{table}.jsonl"
    wildcard_constraints:
        task=one_of(targets.tasks_of(config, "comparison", "transfer")),
        table="(training/)?demonstrations|(gold_)?preferences|labels|pretraining",
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **records_params(),
        form=lambda wildcards: config["tasks"][wildcards.task]["form"],
        code=lambda wildcards: fingerprint("prefopt.data.records", apart=targets.other_readers(config, wildcards.task)),
    shell:
        table_stage(
            "records --task {wildcards.task} --form {params.form} --table {wildcards.table} --recipe - --out {output}",
            stdin="{params.recipe}",
        )


rule prepare:
    input:
        base=model_files("base"),
        raw="results/data/{task}/raw/{side}demonstrations.parquet",
    output:
        demonstrations="results/data/{task}/{side}demonstrations.parquet",
        prompts="results/data/{task}/{side}prompts.parquet",
    log:
        "logs/{task}/{side}prepare.log",
    benchmark:
        "logs/benchmarks/{task}/{side}prepare.jsonl"
    wildcard_constraints:
        task=one_of(targets.tasks_of(config, "comparison", "transfer")),
        side="(training/)?",
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
        table_stage("prepare --raw {input.raw} --model {params.base} --recipe {params.recipe} --out {output}")


use rule prepare as prepare_preferences with:
    input:
        base=model_files("base"),
        raw="results/data/{task}/raw/{pairs}.parquet",
    output:
        "results/data/{task}/{pairs}.parquet",
    log:
        "logs/{task}/prepare_{pairs}.log",
    benchmark:
        "logs/benchmarks/{task}/prepare_{pairs}.jsonl"
    wildcard_constraints:
        task=one_of(targets.tasks_of(config, "comparison", "transfer")),
        pairs="(gold_)?preferences|labels",


# What became of every record.
rule summary:
    input:
        prepared_tables,
    output:
        "results/data/{task}/summary.json",
    log:
        "logs/{task}/summary.log",
    benchmark:
        "logs/benchmarks/{task}/summary.jsonl"
    wildcard_constraints:
        task=one_of(targets.tasks_of(config, "comparison", "transfer")),
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("summary"),
        code=fingerprint("prefopt.data.summary"),
    shell:
        table_stage("summary --tables {input} --recipe {params.recipe} --out {output}")
