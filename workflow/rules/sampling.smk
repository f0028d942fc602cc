# Completions of each policy, all temperatures in one job.


rule sample:
    input:
        model=lambda wildcards: model_files(wildcards.method)(wildcards),
        reference=model_files("reference"),
        prompts="results/data/{task}/prompts.parquet",
    output:
        "results/samples/{task}/{method}.parquet",
    log:
        "logs/{task}/sample_{method}.log",
    benchmark:
        "logs/benchmarks/{task}/sample_{method}.jsonl"
    wildcard_constraints:
        method="base|base_2shot|sft|preferred_ft|dpo|ppo",
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("sample"),
    params:
        model=lambda wildcards: model_folder(wildcards.method)(wildcards),
        reference=model_folder("reference"),
        recipe=recipe("sample"),
        code=fingerprint("prefopt.generation.sample"),
    shell:
        "python -m prefopt --threads {threads} --gpus {resources.gpu} sample --model {params.model:q}"
        " --reference-model {params.reference:q} --prompts {input.prompts} --method {wildcards.method}"
        " --recipe {params.recipe:q} --out {output} > {log} 2>&1"
