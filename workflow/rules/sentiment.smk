# Controlled sentiment: reviews -> prefixes; pairs of the SFT policy's completions, ordered by the true reward.


rule reviews:
    output:
        "results/data/{task}/raw/{table}.parquet",
    log:
        "logs/{task}/reviews/{table}.log",
    benchmark:
        "logs/benchmarks/{task}/reviews/{table}.jsonl"
    wildcard_constraints:
        task=one_of(targets.tasks_of(config, "frontier")),
        table="(training/)?reviews|pretraining",
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **records_params(),
        code=fingerprint("prefopt.data.reviews"),
    shell:
        table_stage("reviews --table {wildcards.table} --recipe - --out {output}", stdin="{params.recipe}")


rule prefixes:
    input:
        reviews="results/data/{task}/raw/{side}reviews.parquet",
        base=model_files("base"),
    output:
        demonstrations="results/data/{task}/{side}demonstrations.parquet",
        prompts="results/data/{task}/{side}prompts.parquet",
        summary="results/data/{task}/{side}summary.json",
    log:
        "logs/{task}/{side}prefixes.log",
    benchmark:
        "logs/benchmarks/{task}/{side}prefixes.jsonl"
    wildcard_constraints:
        task=one_of(targets.tasks_of(config, "frontier")),
        side="(training/)?",
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **model("base", "base"),
        **recipe("prefixes"),
        code=fingerprint("prefopt.data.prefixes"),
    shell:
        table_stage(
            "prefixes --task {wildcards.task} --reviews {input.reviews} --model {params.base} --recipe {params.recipe}"
            " --demonstrations {output.demonstrations} --prompts {output.prompts} --summary {output.summary}"
        )


# Several completions of each prefix, of which the preference pairs are made.
rule pair_samples:
    input:
        model=model_files("sft"),
        prompts="results/data/{task}/training/prompts.parquet",
    output:
        shard_table("sampling", "results/{seed}pairs/{task}_samples.parquet"),
    log:
        of_shard("sampling", "logs/{seed}{task}/pair_samples.log"),
    benchmark:
        of_shard("sampling", "logs/benchmarks/{seed}{task}/pair_samples.jsonl")
    wildcard_constraints:
        task=one_of(targets.tasks_of(config, "frontier")),
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("pair_samples"),
    params:
        **model("sft"),
        **recipe("pair_samples"),
        shard=shard_argument,
        code=fingerprint("prefopt.generation.sample"),
    shell:
        model_stage(
            "sample --model {params.model} --prompts {input.prompts} --run sft --recipe {params.recipe}"
            " {params.shard} --out {output}"
        )


# Many completions of each test prefix, from which the optimal frontier is estimated.
use rule pair_samples as ceiling_samples with:
    input:
        model=model_files("reference"),
        prompts="results/data/{task}/prompts.parquet",
    output:
        shard_table("sampling", "results/{seed}ceiling/{task}_samples.parquet"),
    log:
        of_shard("sampling", "logs/{seed}{task}/ceiling_samples.log"),
    benchmark:
        of_shard("sampling", "logs/benchmarks/{seed}{task}/ceiling_samples.jsonl")
    wildcard_constraints:
        task=one_of(with_frontier),
    resources:
        **model_needs("ceiling_samples"),
    params:
        **model("reference"),
        **recipe("ceiling_samples"),
        shard=shard_argument,
        code=fingerprint("prefopt.generation.sample"),


rule true_rewards:
    input:
        unpack(made(true_reward_files)),
        samples="results/{seed}{purpose}/{task}_samples.parquet",
        prompts=scored_prompts,
    output:
        shard_table("scoring", "results/{seed}{purpose}/{task}_scores.parquet"),
    log:
        of_shard("scoring", "logs/{seed}{task}/true_rewards_{purpose}.log"),
    benchmark:
        of_shard("scoring", "logs/benchmarks/{seed}{task}/true_rewards_{purpose}.jsonl")
    wildcard_constraints:
        task=one_of(with_frontier),
        purpose="pairs|ceiling",
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("true_rewards"),
    params:
        **recipe("true_rewards"),
        true_reward=arguments_of(true_reward_files),
        true_reward_content=brought(true_reward_files),
        shard=shard_argument,
        code=fingerprint("prefopt.rewards.stage"),
    shell:
        model_stage(
            "true_rewards --samples {input.samples} --prompts {input.prompts} {params.true_reward}"
            " --recipe {params.recipe} {params.shard} --out {output}"
        )


# What each run of a task with win rates writes in the end.
use rule true_rewards as run_rewards with:
    input:
        unpack(made(true_reward_files)),
        samples="results/{seed}samples/{task}/{run}.parquet",
        prompts="results/data/{task}/prompts.parquet",
    output:
        shard_table("scoring", "results/{seed}rewards/{task}/{run}.parquet"),
    log:
        of_shard("scoring", "logs/{seed}{task}/rewards_{run}.log"),
    benchmark:
        of_shard("scoring", "logs/benchmarks/{seed}{task}/rewards_{run}.jsonl")
    wildcard_constraints:
        task=with_runs(lambda task: targets.rewarded(config, task)),
    resources:
        **model_needs("run_rewards"),


# Of the candidates too, to see where the best of N by the learned reward has the most of it.
use rule true_rewards as candidate_rewards with:
    input:
        unpack(made(true_reward_files)),
        samples="results/{seed}candidates/{task}.parquet",
        prompts="results/data/{task}/prompts.parquet",
    output:
        "results/{seed}candidates/{task}_true_rewards.parquet",
    log:
        "logs/{seed}{task}/candidate_rewards.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/candidate_rewards.jsonl"
    wildcard_constraints:
        task=one_of([task for task in with_frontier if targets.has_candidates(config, task)]),
    resources:
        **model_needs("candidate_rewards"),
    params:
        **recipe("true_rewards"),
        true_reward=arguments_of(true_reward_files),
        true_reward_content=brought(true_reward_files),
        shard=[],
        code=fingerprint("prefopt.rewards.stage"),


rule sampled_pairs:
    input:
        samples="results/{seed}pairs/{task}_samples.parquet",
        scores="results/{seed}pairs/{task}_scores.parquet",
        prompts="results/data/{task}/training/prompts.parquet",
    output:
        preferences="results/{seed}data/{task}/preferences.parquet",
        summary="results/{seed}data/{task}/pairs_summary.json",
    log:
        "logs/{seed}{task}/sampled_pairs.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/sampled_pairs.jsonl"
    wildcard_constraints:
        task=one_of(targets.tasks_of(config, "frontier")),
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("sampled_pairs"),
        code=fingerprint("prefopt.data.sampled_pairs"),
    shell:
        table_stage(
            "sampled_pairs --samples {input.samples} --scores {input.scores} --prompts {input.prompts}"
            " --recipe {params.recipe} --out {output.preferences} --summary {output.summary}"
        )


# The same pairs taken apart, for KTO.
rule pair_labels:
    input:
        "results/{seed}data/{task}/preferences.parquet",
    output:
        "results/{seed}data/{task}/labels.parquet",
    log:
        "logs/{seed}{task}/pair_labels.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/pair_labels.jsonl"
    wildcard_constraints:
        task=one_of(targets.tasks_of(config, "frontier")),
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        code=fingerprint("prefopt.data.labels"),
    shell:
        table_stage("pair_labels --data {input} --out {output}")


# The true reward of real reviews: a classifier trained on their labels, and how far it can be trusted.
rule classifier:
    input:
        model=model_files("base"),
        reviews="results/data/{task}/raw/reviews.parquet",
    output:
        model=directory("results/models/{task}/classifier"),
        metrics="results/training/{task}/classifier.jsonl",
        table=report(
            "results/{task}_classifier.csv",
            caption="../report/classifier.rst",
            category="Frontier",
            labels={
                "task": "{task}",
                "what": "accuracy and calibration of the true reward",
            },
        ),
    log:
        "logs/{task}/classifier.log",
    benchmark:
        "logs/benchmarks/{task}/classifier.jsonl"
    wildcard_constraints:
        task=one_of(tasks_with_reward("classifier")),
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("classifier"),
    params:
        **model("base"),
        **recipe("classifier"),
        code=fingerprint("prefopt.training.classifier"),
    shell:
        model_stage(
            "classifier --model {params.model} --reviews {input.reviews} --recipe {params.recipe}"
            " --work {work}/{wildcards.task}/classifier --out {output.model} --metrics {output.metrics}"
            " --table {output.table}"
        )


rule ngrams:
    input:
        base=model_files("base"),
        reviews="results/data/{task}/raw/reviews.parquet",
    output:
        ngrams="results/data/{task}/ngrams.parquet",
        table=report(
            "results/{task}_classifier.csv",
            caption="../report/classifier.rst",
            category="Frontier",
            labels={
                "task": "{task}",
                "what": "accuracy and calibration of the true reward",
            },
        ),
    log:
        "logs/{task}/ngrams.log",
    benchmark:
        "logs/benchmarks/{task}/ngrams.jsonl"
    wildcard_constraints:
        task=one_of(tasks_with_reward("ngrams")),
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        **{**TABLE_RESOURCES, "mem_mb": 4000},  # it counts the n-grams of all reviews
    params:
        **model("base", "base"),
        **recipe("ngrams"),
        code=fingerprint("prefopt.training.ngrams"),
    shell:
        table_stage(
            "ngrams --model {params.base} --reviews {input.reviews} --recipe {params.recipe}"
            " --table {output.table} --out {output.ngrams}"
        )
