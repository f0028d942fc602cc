# The SFT policy, which is also the reference policy, and Preferred-FT.


rule sft:
    input:
        model=model_files("base"),
        data="results/data/{task}/training/demonstrations.parquet",
    output:
        model=directory("results/models/{task}/sft"),
        metrics="results/training/{task}/sft.jsonl",
    log:
        "logs/{task}/sft.log",
    benchmark:
        "logs/benchmarks/{task}/sft.jsonl"
    # On the longest path.
    priority: 1
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("sft"),
    params:
        **model("base"),
        **recipe("sft"),
        code=fingerprint("prefopt.training.sft"),
    shell:
        model_stage(
            "sft --model {params.model} --data {input.data} --recipe {params.recipe} --work work/{wildcards.task}/sft"
            " --out {output.model} --metrics {output.metrics}"
        )


rule preferred_ft:
    input:
        model=model_files("base"),
        data="results/data/{task}/preferences.parquet",
    output:
        model=directory("results/models/{task}/preferred_ft"),
        metrics="results/training/{task}/preferred_ft.jsonl",
    log:
        "logs/{task}/preferred_ft.log",
    benchmark:
        "logs/benchmarks/{task}/preferred_ft.jsonl"
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("preferred_ft"),
    params:
        **model("base"),
        **recipe("preferred_ft"),
        code=fingerprint("prefopt.training.sft"),
    shell:
        model_stage(
            "sft --model {params.model} --data {input.data} --recipe {params.recipe}"
            " --work work/{wildcards.task}/preferred_ft --out {output.model} --metrics {output.metrics}"
        )
