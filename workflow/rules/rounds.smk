# Runs that are trained in rounds: each samples the present policy, labels what it wrote, and trains it on the pairs. What
# a round reads is the round before it, so that a further round makes itself alone.


rule round_prompts:
    input:
        prompts="results/data/{task}/training/prompts.parquet",
    output:
        "results/{seed}rounds/{task}/{run}/{round}/prompts.parquet",
    log:
        "logs/{seed}{task}/rounds/{run}/{round}/prompts.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/rounds/{run}/{round}/prompts.jsonl"
    wildcard_constraints:
        task=with_runs(runs_in_rounds()),
        round=ROUND,
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe_of_round("round_prompts"),
        code=fingerprint("prefopt.data.round_prompts"),
    shell:
        table_stage("round_prompts --prompts {input.prompts} --recipe {params.recipe} --out {output}")


use rule candidates as round_samples with:
    input:
        model=model_files(policy_of_round),
        prompts="results/{seed}rounds/{task}/{run}/{round}/prompts.parquet",
    output:
        shard_table("sampling", "results/{seed}rounds/{task}/{run}/{round}/samples.parquet"),
    log:
        of_shard("sampling", "logs/{seed}{task}/rounds/{run}/{round}/samples.log"),
    benchmark:
        of_shard("sampling", "logs/benchmarks/{seed}{task}/rounds/{run}/{round}/samples.jsonl")
    wildcard_constraints:
        task=with_runs(runs_in_rounds()),
        round=ROUND,
    resources:
        **model_needs("round_samples"),
    params:
        **model(policy_of_round),
        **recipe_of_round("round_samples"),
        policy="{run}",
        shard=shard_argument,
        earlier=placed("results/{seed}rounds/{task}/{run}/{round}/samples.parquet"),
        code=fingerprint("prefopt.generation.sample"),


# Labels: a rule for each kind.
use rule score as round_scores with:
    input:
        model=model_files("reward_model"),
        prompts="results/{seed}rounds/{task}/{run}/{round}/prompts.parquet",
        samples="results/{seed}rounds/{task}/{run}/{round}/samples.parquet",
    output:
        shard_table("scoring", "results/{seed}rounds/{task}/{run}/{round}/scores.parquet"),
    log:
        of_shard("scoring", "logs/{seed}{task}/rounds/{run}/{round}/scores.log"),
    benchmark:
        of_shard("scoring", "logs/benchmarks/{seed}{task}/rounds/{run}/{round}/scores.jsonl")
    wildcard_constraints:
        task=with_runs(runs_in_rounds("reward_model")),
        round=ROUND,
    resources:
        **model_needs("round_scores"),


use rule true_rewards as round_true_rewards with:
    input:
        unpack(made(true_reward_files)),
        samples="results/{seed}rounds/{task}/{run}/{round}/samples.parquet",
        prompts="results/{seed}rounds/{task}/{run}/{round}/prompts.parquet",
    output:
        shard_table("scoring", "results/{seed}rounds/{task}/{run}/{round}/scores.parquet"),
    log:
        of_shard("scoring", "logs/{seed}{task}/rounds/{run}/{round}/scores.log"),
    benchmark:
        of_shard("scoring", "logs/benchmarks/{seed}{task}/rounds/{run}/{round}/scores.jsonl")
    wildcard_constraints:
        task=with_runs(runs_in_rounds("true_reward")),
        round=ROUND,
    resources:
        **model_needs("round_true_rewards"),


rule round_implicit_rewards:
    input:
        model=model_files(policy_of_round),
        reference=model_files("reference"),
        prompts="results/{seed}rounds/{task}/{run}/{round}/prompts.parquet",
        samples="results/{seed}rounds/{task}/{run}/{round}/samples.parquet",
    output:
        shard_table("scoring", "results/{seed}rounds/{task}/{run}/{round}/scores.parquet"),
    log:
        of_shard("scoring", "logs/{seed}{task}/rounds/{run}/{round}/scores.log"),
    benchmark:
        of_shard("scoring", "logs/benchmarks/{seed}{task}/rounds/{run}/{round}/scores.jsonl")
    wildcard_constraints:
        task=with_runs(runs_in_rounds("implicit")),
        round=ROUND,
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("round_implicit_rewards"),
    params:
        **model(policy_of_round),
        **model("reference", "reference"),
        **recipe_of_round("round_implicit_rewards"),
        shard=shard_argument,
        code=fingerprint("prefopt.generation.implicit_rewards"),
    shell:
        model_stage(
            "implicit_rewards --model {params.model} --reference-model {params.reference} --prompts {input.prompts}"
            " --samples {input.samples} --recipe {params.recipe} {params.shard} --out {output}"
        )


# By the task's own judge, who then also judges what was learned from it.
rule round_judge_labels:
    input:
        unpack(made(judge_files)),
        samples="results/{seed}rounds/{task}/{run}/{round}/samples.parquet",
        prompts="results/{seed}rounds/{task}/{run}/{round}/prompts.parquet",
    output:
        shard_table("judging", "results/{seed}rounds/{task}/{run}/{round}/scores.parquet"),
    log:
        of_shard("judging", "logs/{seed}{task}/rounds/{run}/{round}/scores.log"),
    benchmark:
        of_shard("judging", "logs/benchmarks/{seed}{task}/rounds/{run}/{round}/scores.jsonl")
    wildcard_constraints:
        task=with_runs(runs_labelled_by_a_judge),
        round=ROUND,
    conda:
        "../../envs/judge.yaml"
    threads: MODEL_THREADS
    resources:
        **judge_needs("round_judge_labels"),
    params:
        **judge_params("prefopt.judging.labels"),
        shard=shard_argument,
    shell:
        judging_stage(
            "judge_labels --samples {input.samples} --prompts {input.prompts} {params.judge} --recipe {params.recipe}"
            " {params.shard} --out {output}"
        )


use rule sampled_pairs as round_pairs with:
    input:
        samples="results/{seed}rounds/{task}/{run}/{round}/samples.parquet",
        scores="results/{seed}rounds/{task}/{run}/{round}/scores.parquet",
        prompts="results/{seed}rounds/{task}/{run}/{round}/prompts.parquet",
    output:
        preferences="results/{seed}rounds/{task}/{run}/{round}/preferences.parquet",
        summary="results/{seed}rounds/{task}/{run}/{round}/pairs_summary.json",
    log:
        "logs/{seed}{task}/rounds/{run}/{round}/pairs.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/rounds/{run}/{round}/pairs.jsonl"
    wildcard_constraints:
        task=with_runs(runs_in_rounds()),
        round=ROUND,
    params:
        **recipe_of_round("round_pairs"),
        code=fingerprint("prefopt.data.sampled_pairs"),


use rule reference as round_reference with:
    input:
        model=model_files(reference_of_round),
        data="results/{seed}rounds/{task}/{run}/{round}/preferences.parquet",
    output:
        "results/{seed}rounds/{task}/{run}/{round}/reference.parquet",
    log:
        "logs/{seed}{task}/rounds/{run}/{round}/reference.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/rounds/{run}/{round}/reference.jsonl"
    wildcard_constraints:
        task=with_runs(runs_in_rounds()),
        round=ROUND,
    resources:
        **model_needs("round_reference"),
    params:
        **model(reference_of_round),
        **recipe("reference"),
        code=fingerprint("prefopt.training.reference"),


rule iterative_dpo:
    input:
        model=model_files(policy_of_round),
        reference_policy=model_files(reference_of_round),
        data="results/{seed}rounds/{task}/{run}/{round}/preferences.parquet",
        reference="results/{seed}rounds/{task}/{run}/{round}/reference.parquet",
    output:
        model=directory("results/{seed}rounds/{task}/{run}/{round}/model"),
        metrics="results/{seed}training/{task}/{run}_round_{round}.jsonl",
    log:
        "logs/{seed}{task}/rounds/{run}/{round}/train.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/rounds/{run}/{round}/train.jsonl"
    wildcard_constraints:
        task=with_runs(runs_in_rounds(), "_round_[0-9]+"),
        round=ROUND,
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("iterative_dpo"),
    params:
        **model(policy_of_round),
        **model(reference_of_round, "reference_policy"),
        **recipe_params(
            lambda wildcards: stage_recipes.training_recipe(seeded(wildcards), wildcards.task, wildcards.run)
        ),
        code=fingerprint("prefopt.training.preference", apart=targets.BY_STEP),
    shell:
        model_stage(
            "preference --model {params.model} --reference-model {params.reference_policy} --data {input.data}"
            " --reference {input.reference} --recipe {params.recipe}"
            " --work {work}/{wildcards.seed}{wildcards.task}/rounds/{wildcards.run}/{wildcards.round} --out {output.model}"
            " --metrics {output.metrics}"
        )
