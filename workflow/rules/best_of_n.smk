# Best-of-N: candidates of the SFT policy, their rewards, and the best of the first N (any N up to their number).


rule candidates:
    input:
        model=model_files("sft"),
        prompts="results/data/{task}/prompts.parquet",
    output:
        "results/candidates/{task}.parquet",
    log:
        "logs/{task}/candidates.log",
    benchmark:
        "logs/benchmarks/{task}/candidates.jsonl"
    # On the longest path.
    priority: 1
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **MODEL_RESOURCES,
    params:
        model=model_folder("sft"),
        recipe=recipe("candidates"),
        code=fingerprint("prefopt.generation.sample"),
    shell:
        "python -m prefopt --threads {threads} sample --model {params.model:q}"
        " --prompts {input.prompts} --method sft --recipe {params.recipe:q} --out {output} > {log} 2>&1"


rule score:
    input:
        model="results/models/{task}/reward_model",
        prompts="results/data/{task}/prompts.parquet",
        samples="results/candidates/{task}.parquet",
    output:
        "results/candidates/{task}_scores.parquet",
    log:
        "logs/{task}/score.log",
    benchmark:
        "logs/benchmarks/{task}/score.jsonl"
    # On the longest path.
    priority: 1
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **MODEL_RESOURCES,
    params:
        recipe=recipe("score"),
        code=fingerprint("prefopt.generation.score"),
    shell:
        "python -m prefopt --threads {threads} score --model {input.model} --prompts {input.prompts}"
        " --samples {input.samples} --recipe {params.recipe:q} --out {output} > {log} 2>&1"


rule best_of_n:
    input:
        candidates="results/candidates/{task}.parquet",
        scores="results/candidates/{task}_scores.parquet",
        greedy="results/samples/{task}/sft.parquet",
        prompts="results/data/{task}/prompts.parquet",
        reference=model_files("sft"),
    output:
        "results/samples/{task}/best_of_{n}.parquet",
    log:
        "logs/{task}/best_of_{n}.log",
    benchmark:
        "logs/benchmarks/{task}/best_of_{n}.jsonl"
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **MODEL_RESOURCES,
    params:
        reference=model_folder("sft"),
        recipe=recipe("best_of_n"),
        code=fingerprint("prefopt.generation.best_of_n"),
    shell:
        "python -m prefopt --threads {threads} best_of_n --candidates {input.candidates} --scores {input.scores}"
        " --greedy {input.greedy} --prompts {input.prompts} --reference-model {params.reference:q} --n {wildcards.n}"
        " --recipe {params.recipe:q} --out {output} > {log} 2>&1"
