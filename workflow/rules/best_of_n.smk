# Best-of-N: candidates of the SFT policy, their rewards, and the best of the first N (any N up to their number).


rule candidates:
    input:
        model=model_files("reference"),
        prompts="results/data/{task}/prompts.parquet",
    output:
        shard_table("sampling", "results/{seed}candidates/{task}.parquet"),
    log:
        of_shard("sampling", "logs/{seed}{task}/candidates.log"),
    benchmark:
        of_shard("sampling", "logs/benchmarks/{seed}{task}/candidates.jsonl")
    # On the longest path.
    priority: 2
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("candidates"),
    params:
        **model("reference"),
        **recipe("candidates"),
        policy=lambda wildcards: runs.reference(config, wildcards.task),
        shard=shard_argument,
        earlier=placed("results/{seed}candidates/{task}.parquet"),
        code=fingerprint("prefopt.generation.sample"),
    shell:
        model_stage(
            "sample --model {params.model} --prompts {input.prompts} --run {params.policy}"
            " --recipe {params.recipe} {params.shard} --earlier {params.earlier} --out {output}"
        )


rule score:
    input:
        model=model_files("reward_model"),
        prompts="results/data/{task}/prompts.parquet",
        samples="results/{seed}candidates/{task}.parquet",
    output:
        shard_table("scoring", "results/{seed}candidates/{task}_scores.parquet"),
    log:
        of_shard("scoring", "logs/{seed}{task}/score.log"),
    benchmark:
        of_shard("scoring", "logs/benchmarks/{seed}{task}/score.jsonl")
    # On the longest path.
    priority: 2
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("score"),
    params:
        **model("reward_model"),
        **recipe("score"),
        shard=shard_argument,
        code=fingerprint("prefopt.generation.score"),
    shell:
        model_stage(
            "score --model {params.model} --prompts {input.prompts} --samples {input.samples} --recipe {params.recipe}"
            " {params.shard} --out {output}"
        )


rule best_of_n:
    input:
        candidates="results/{seed}candidates/{task}.parquet",
        scores="results/{seed}candidates/{task}_scores.parquet",
        greedy=lambda wildcards: f"results/{wildcards.seed}samples/{wildcards.task}/{runs.reference(config, wildcards.task)}.parquet",
        prompts="results/data/{task}/prompts.parquet",
        reference=model_files("reference"),
    output:
        "results/{seed}samples/{task}/{run}.parquet",
    log:
        "logs/{seed}{task}/{run}.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/{run}.jsonl"
    wildcard_constraints:
        task=with_runs(lambda task: runs.choices(config, task)),
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("best_of_n"),
    params:
        **model("reference", "reference"),
        **recipe("best_of_n"),
        n=lambda wildcards: runs.choices(config, wildcards.task)[wildcards.run],
        code=fingerprint("prefopt.generation.best_of_n"),
    shell:
        model_stage(
            "best_of_n --candidates {input.candidates} --scores {input.scores} --greedy {input.greedy}"
            " --prompts {input.prompts} --reference-model {params.reference} --run {wildcards.run}"
            " --n {params.n} --recipe {params.recipe} --out {output}"
        )


# For a judge that costs something.
rule subsets:
    input:
        candidates="results/{seed}candidates/{task}.parquet",
        scores="results/{seed}candidates/{task}_scores.parquet",
    output:
        "results/{seed}candidates/{task}_subsets.parquet",
    log:
        "logs/{seed}{task}/subsets.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/subsets.jsonl"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("subsets"),
        code=fingerprint("prefopt.generation.subsets"),
    shell:
        table_stage(
            "subsets --candidates {input.candidates} --scores {input.scores} --recipe {params.recipe} --out {output}"
        )


# Every candidate where judging is free, so that every N can be read.
use rule judge as judge_candidates with:
    input:
        unpack(made(judge_files)),
        unpack(against_files),
        samples=judged_candidates,
        prompts="results/data/{task}/prompts.parquet",
        demonstrations="results/data/{task}/demonstrations.parquet",
    output:
        shard_table("judging", "results/{seed}candidates/{task}_verdicts.parquet"),
    log:
        of_shard("judging", "logs/{seed}{task}/judge_candidates.log"),
    benchmark:
        of_shard("judging", "logs/benchmarks/{seed}{task}/judge_candidates.jsonl")
    resources:
        **judge_needs("judge_candidates"),


rule best_of_n_curve:
    input:
        unpack(one_sample_files),
        unpack(subset_files),
        candidates="results/{seed}candidates/{task}.parquet",
        scores="results/{seed}candidates/{task}_scores.parquet",
        verdicts="results/{seed}candidates/{task}_verdicts.parquet",
        prompts="results/data/{task}/prompts.parquet",
    output:
        "results/{seed}candidates/{task}_curve.csv",
    log:
        "logs/{seed}{task}/best_of_n_curve.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/best_of_n_curve.jsonl"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("best_of_n_curve"),
        one_sample=arguments_of(one_sample_files),
        judged=arguments_of(subset_files),
        code=fingerprint("prefopt.analysis.best_of_n_curve"),
    shell:
        table_stage(
            "best_of_n_curve --candidates {input.candidates} --scores {input.scores} --verdicts {input.verdicts}"
            " --prompts {input.prompts} {params.judged} {params.one_sample} --recipe {params.recipe} --out {output}"
        )


rule best_of_n_figure:
    input:
        curves=curves_of_tasks,
        summaries=summaries_of_curves,
    output:
        table=report(
            "results/best_of_n.csv",
            caption="../report/best_of_n.rst",
            category="Best-of-N",
            labels={"task": "all", "what": "table"},
        ),
        svg=report(
            "results/best_of_n.svg",
            caption="../report/best_of_n.rst",
            category="Best-of-N",
            labels={"task": "all", "what": "figure"},
        ),
        png="results/best_of_n.png",
        pdf="results/best_of_n.pdf",
    log:
        "logs/best_of_n_figure.log",
    benchmark:
        "logs/benchmarks/best_of_n_figure.jsonl"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        code=fingerprint("prefopt.analysis.best_of_n_figure"),
    shell:
        table_stage(
            "best_of_n_figure --curves {input.curves} --summaries {input.summaries} --table {output.table}"
            " --out {output.svg} {output.png} {output.pdf}"
        )
