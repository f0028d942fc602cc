# Verdicts: each sample against its prompt's reference text.


rule judge:
    input:
        unpack(gold_files),
        samples="results/samples/{task}/{method}.parquet",
        prompts="results/data/{task}/prompts.parquet",
        demonstrations="results/data/{task}/demonstrations.parquet",
    output:
        "results/verdicts/{task}/{method}.parquet",
    log:
        "logs/{task}/judge_{method}.log",
    benchmark:
        "logs/benchmarks/{task}/judge_{method}.jsonl"
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **MODEL_RESOURCES,
    params:
        gold=arguments_of(gold_files),
        recipe=recipe("judge"),
        code=fingerprint("prefopt.judging.stage"),
    shell:
        "python -m prefopt --threads {threads} judge --samples {input.samples} --prompts {input.prompts}"
        " --demonstrations {input.demonstrations} {params.gold} --recipe {params.recipe:q} --out {output} > {log} 2>&1"
