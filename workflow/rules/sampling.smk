# Completions of each policy, all temperatures in one job.


rule sample:
    input:
        model=model_files(None),
        reference=model_files("reference"),
        prompts="results/data/{task}/prompts.parquet",
    output:
        shard_table("sampling", "results/samples/{task}/{method}.parquet"),
    log:
        of_shard("sampling", "logs/{task}/sample_{method}.log"),
    benchmark:
        of_shard("sampling", "logs/benchmarks/{task}/sample_{method}.jsonl")
    wildcard_constraints:
        method=SAMPLED,
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("sample"),
    params:
        **model(None),
        **model("reference", "reference"),
        **recipe("sample"),
        shard=shard_argument,
        earlier="results/samples/{task}/{method}.parquet",
        code=fingerprint("prefopt.generation.sample"),
    shell:
        model_stage(
            "sample --model {params.model} --reference-model {params.reference} --prompts {input.prompts}"
            " --method {wildcards.method} --recipe {params.recipe} {params.shard} --earlier {params.earlier}"
            " --out {output}"
        )
