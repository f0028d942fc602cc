# Direct preference optimization, from the reference policy and its cached log-probabilities.


rule dpo:
    input:
        model=model_files("reference"),
        data="results/data/{task}/preferences.parquet",
        reference="results/logprobs/{task}/reference.parquet",
    output:
        model=directory("results/models/{task}/dpo"),
        metrics="results/training/{task}/dpo.jsonl",
    log:
        "logs/{task}/dpo.log",
    benchmark:
        "logs/benchmarks/{task}/dpo.jsonl"
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **MODEL_RESOURCES,
    params:
        model=model_folder("reference"),
        recipe=recipe("dpo"),
        code=fingerprint("prefopt.training.dpo"),
    shell:
        "python -m prefopt --threads {threads} dpo --model {params.model:q} --data {input.data}"
        " --reference {input.reference} --recipe {params.recipe:q} --work work/{wildcards.task}/dpo"
        " --out {output.model} --metrics {output.metrics} > {log} 2>&1"
