# Reward against KL: the runs of the sweep, or what other runs wrote while they trained; the optimal frontier, who
# dominates whom, the figure.

EVALUATIONS = "results/{seed}frontier/{task}/{run}.parquet"

with_frontier = [task for task, section in config["tasks"].items() if targets.measures_frontier(section)]


# A run of the sweep: its method's trainer, which also evaluates the policy in memory.
rule frontier_run:
    input:
        unpack(made(swept_files)),
        model=model_files("reference"),
        sampled_prompts=PROMPTS_TABLE,
    output:
        evaluations=EVALUATIONS,
        model=directory("results/{seed}models/{task}/{run}"),
        metrics="results/{seed}training/{task}/{run}.jsonl",
    log:
        "logs/{seed}{task}/frontier_{run}.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/frontier_{run}.jsonl"
    wildcard_constraints:
        task=with_runs(swept_runs),
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("frontier_run"),
    params:
        **model("reference"),
        **training_params(swept_files),
        **by_step("evaluations", EVALUATIONS),
        code=lambda wildcards: fingerprint(*targets.trainer_code(config, wildcards.task, wildcards.run)),
    shell:
        model_stage(
            "{params.stage} --model {params.model} {params.files} --recipe {params.recipe} {params.by_step}"
            " --work {work}/{wildcards.seed}{wildcards.task}/{wildcards.run} --out {output.model}"
            " --metrics {output.metrics}"
        )


# A run in rounds: the policies that they end with, of a sweep.
rule round_evaluations:
    input:
        unpack(made(evaluation_files)),
        model=model_files("reference"),
        rounds=models_of_rounds,
        sampled_prompts=PROMPTS_TABLE,
    output:
        EVALUATIONS,
    log:
        "logs/{seed}{task}/frontier_{run}.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/frontier_{run}.jsonl"
    wildcard_constraints:
        task=with_runs(swept_in_rounds),
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("round_evaluations"),
    params:
        **model("reference"),
        **by_step("evaluations", EVALUATIONS),
        rewards=arguments_of(evaluation_files),
        rewards_content=brought(evaluation_files),
        code=fingerprint("prefopt.training.round_evaluations"),
    shell:
        model_stage(
            "round_evaluations --model {params.model} --rounds {input.rounds} {params.rewards} {params.by_step}"
        )


# And of a task with win rates, where they are sampled.
use rule round_evaluations as sampled_rounds with:
    input:
        model=model_files("reference"),
        rounds=models_of_rounds,
        sampled_prompts=PROMPTS_TABLE,
    output:
        SAMPLES_BY_STEP,
    log:
        "logs/{seed}{task}/sampled_rounds_{run}.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/sampled_rounds_{run}.jsonl"
    wildcard_constraints:
        task=with_runs(lambda task: targets.sampled_rounds(config, task), "_by_step"),
    resources:
        **model_needs("sampled_rounds"),
    params:
        **model("reference"),
        **by_step("samples", SAMPLES_BY_STEP),
        rewards=[],
        code=fingerprint("prefopt.training.round_evaluations"),


# Of a task with win rates: what was sampled while a run trained.
rule evaluations:
    input:
        unpack(made(evaluation_files)),
        reference=model_files("reference"),
        samples=SAMPLES_BY_STEP,
        prompts="results/data/{task}/prompts.parquet",
    output:
        EVALUATIONS,
    log:
        "logs/{seed}{task}/evaluations_{run}.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/evaluations_{run}.jsonl"
    wildcard_constraints:
        task=one_of([task for task in targets.tasks_of(config, "comparison") if targets.measured(config, task)]),
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("evaluations"),
    params:
        **model("reference", "reference"),
        **recipe_params(
            lambda wildcards: stage_recipes.evaluations_recipe(seeded(wildcards), wildcards.task, wildcards.run)
        ),
        rewards=arguments_of(evaluation_files),
        rewards_content=brought(evaluation_files),
        code=fingerprint("prefopt.generation.evaluations"),
    shell:
        model_stage(
            "evaluations --samples {input.samples} --prompts {input.prompts} --reference-model {params.reference}"
            " {params.rewards} --recipe {params.recipe} --out {output}"
        )


rule optimal_frontier:
    input:
        scores=ceiling_scores,
    output:
        report(
            "results/{task}_ceiling.csv",
            caption="../report/ceiling.rst",
            category="Frontier",
            labels={"task": "{task}", "what": "optimal frontier"},
        ),
    log:
        "logs/{task}/optimal_frontier.log",
    benchmark:
        "logs/benchmarks/{task}/optimal_frontier.jsonl"
    wildcard_constraints:
        task=one_of(with_frontier),
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("optimal_frontier"),
        code=fingerprint("prefopt.analysis.optimal_frontier"),
    shell:
        table_stage("optimal_frontier --scores {input.scores} --recipe {params.recipe} --out {output}")


rule frontier:
    input:
        evaluations=runs_of_sweep,
        scores=ceiling_scores,
        ceiling="results/{task}_ceiling.csv",
    output:
        report(
            "results/{task}_frontier.csv",
            caption="../report/frontier.rst",
            category="Frontier",
            labels={"task": "{task}", "what": "every checkpoint of every run"},
        ),
    log:
        "logs/{task}/frontier.log",
    benchmark:
        "logs/benchmarks/{task}/frontier.jsonl"
    wildcard_constraints:
        task=one_of(with_frontier),
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("frontier"),
        code=fingerprint("prefopt.analysis.frontier"),
    shell:
        table_stage(
            "frontier --evaluations {input.evaluations} --scores {input.scores} --ceiling {input.ceiling}"
            " --recipe {params.recipe} --out {output}"
        )


rule dominance:
    input:
        evaluations=runs_of_sweep,
    output:
        report(
            "results/{task}_dominance.csv",
            caption="../report/dominance.rst",
            category="Frontier",
            labels={"task": "{task}", "what": "which method dominates"},
        ),
    log:
        "logs/{task}/dominance.log",
    benchmark:
        "logs/benchmarks/{task}/dominance.jsonl"
    wildcard_constraints:
        task=one_of(with_frontier),
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("dominance"),
        code=fingerprint("prefopt.analysis.dominance"),
    shell:
        table_stage("dominance --evaluations {input.evaluations} --recipe {params.recipe} --out {output}")


rule frontier_figure:
    input:
        frontier="results/{task}_frontier.csv",
        ceiling="results/{task}_ceiling.csv",
        summary="results/data/{task}/summary.json",
    output:
        svg=report(
            "results/{task}_frontier.svg",
            caption="../report/frontier.rst",
            category="Frontier",
            labels={"task": "{task}", "what": "figure"},
        ),
        png="results/{task}_frontier.png",
        pdf="results/{task}_frontier.pdf",
    log:
        "logs/{task}/frontier_figure.log",
    benchmark:
        "logs/benchmarks/{task}/frontier_figure.jsonl"
    wildcard_constraints:
        task=one_of(with_frontier),
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("frontier_figure"),
        code=fingerprint("prefopt.analysis.frontier_figure"),
    shell:
        table_stage(
            "frontier_figure --frontier {input.frontier} --ceiling {input.ceiling} --summary {input.summary}"
            " --recipe {params.recipe} --out {output.svg} {output.png} {output.pdf}"
        )
