# Completions of each policy, all temperatures in one job.


rule sample:
    input:
        model=model_files(policy),
        reference=model_files("reference"),
        prompts="results/data/{task}/prompts.parquet",
    output:
        shard_table("sampling", "results/{seed}samples/{task}/{run}.parquet"),
    log:
        of_shard("sampling", "logs/{seed}{task}/sample_{run}.log"),
    benchmark:
        of_shard("sampling", "logs/benchmarks/{seed}{task}/sample_{run}.jsonl")
    wildcard_constraints:
        task=with_runs(sampled_runs),
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("sample"),
    params:
        **model(policy),
        **model("reference", "reference"),
        **recipe("sample"),
        shots=lambda wildcards: runs.entry(config, wildcards.task, wildcards.run).shots,
        shard=shard_argument,
        earlier=placed("results/{seed}samples/{task}/{run}.parquet"),
        code=fingerprint("prefopt.generation.sample"),
    shell:
        model_stage(
            "sample --model {params.model} --reference-model {params.reference} --prompts {input.prompts}"
            " --run {wildcards.run} --shots {params.shots} --recipe {params.recipe} {params.shard} --earlier {params.earlier}"
            " --out {output}"
        )
