# How often a gold reward model agrees with people, and verdicts: each sample against its prompt's reference text, or against
# a run's completion.


rule judge_accuracy:
    input:
        model=model_files("gold_reward_model"),
        data="results/data/{task}/gold_preferences.parquet",
    output:
        "results/judges/{task}.parquet",
    log:
        "logs/{task}/judge_accuracy.log",
    benchmark:
        "logs/benchmarks/{task}/judge_accuracy.jsonl"
    conda:
        "../../envs/judge.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("judge_accuracy"),
    params:
        **model("gold_reward_model"),
        **recipe("judge_accuracy"),
        code=fingerprint("prefopt.judging.accuracy"),
    shell:
        model_stage(
            "judge_accuracy --gold-model {params.model} --gold-data {input.data} --recipe {params.recipe} --out {output}"
        )


rule judge:
    input:
        unpack(made(judge_files)),
        unpack(against_files),
        samples="results/{seed}samples/{task}/{run}.parquet",
        prompts="results/data/{task}/prompts.parquet",
        demonstrations="results/data/{task}/demonstrations.parquet",
    output:
        shard_table("judging", "results/{seed}verdicts/{task}/{run}.parquet"),
    log:
        of_shard("judging", "logs/{seed}{task}/judge_{run}.log"),
    benchmark:
        of_shard("judging", "logs/benchmarks/{seed}{task}/judge_{run}.jsonl")
    conda:
        "../../envs/judge.yaml"
    threads: MODEL_THREADS
    resources:
        **judge_needs("judge"),
    params:
        **judge_params("prefopt.judging.stage"),
        selected=[],
        against=against_arguments,
        shard=shard_argument,
    shell:
        judging_stage(
            "judge --samples {input.samples} --prompts {input.prompts} --demonstrations {input.demonstrations}"
            " {params.judge} {params.selected} {params.against} --recipe {params.recipe} {params.shard} --out {output}"
        )


# Another judge sees what each run writes at the temperature that the task's own judge selected.
use rule judge as other_judge with:
    input:
        unpack(made(judge_files)),
        unpack(against_files),
        samples="results/{seed}samples/{task}/{run}.parquet",
        prompts="results/data/{task}/prompts.parquet",
        demonstrations="results/data/{task}/demonstrations.parquet",
        verdicts="results/{seed}verdicts/{task}/{run}.parquet",
    output:
        shard_table("judging", "results/{seed}verdicts/{task}/{judge}/{run}.parquet"),
    log:
        of_shard("judging", "logs/{seed}{task}/judge_{judge}_{run}.log"),
    benchmark:
        of_shard("judging", "logs/benchmarks/{seed}{task}/judge_{judge}_{run}.jsonl")
    params:
        **judge_params("prefopt.judging.stage"),
        selected=["--selected-by", placed("results/{seed}verdicts/{task}/{run}.parquet")],
        against=against_arguments,
        shard=shard_argument,


rule judge_agreement:
    input:
        lambda wildcards: [path for *_, path in targets.verdict_tables(config)],
    output:
        report(
            "results/judge_agreement.csv",
            caption="../report/judge_agreement.rst",
            category="Judges",
            labels={"task": "all", "what": "agreement of judges"},
        ),
    log:
        "logs/judge_agreement.log",
    benchmark:
        "logs/benchmarks/judge_agreement.jsonl"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        recipe=recipe_of_all(stage_recipes.agreement_recipe),
        code=fingerprint("prefopt.analysis.judge_agreement"),
    shell:
        table_stage("judge_agreement --verdicts {input} --recipe {params.recipe} --out {output}")
