# Win rates with intervals, figures, and what the runs wrote.
import time

from prefopt.analysis import answers_directive
from prefopt.runtime import ticker

STARTED = time.time()
answers_directive.register()  # workflow.rst opens a report with it


onstart:
    # The main process alone: Slurm's jobs start Snakemake too.
    quiet = {kind.name for kind in workflow.output_settings.quiet or ()}
    if workflow.is_main_process and not quiet & {"ALL", "PROGRESS"}:
        ticker.start(logger.info)


onerror:
    ticker.stop()


onsuccess:
    ticker.stop()
    from prefopt.analysis.shown import shown  # and pandas, which every start of Snakemake would wait for

    print(shown(Path("results"), STARTED), file=sys.stderr)


rule win_rates:
    input:
        verdicts=of_every_run("verdicts"),
        samples=of_every_run("samples"),
        summary="results/data/{task}/summary.json",
    output:
        table=report(
            "results/{task}_winrates.csv",
            caption="../report/win_rates.rst",
            category="Win rates",
            labels={"task": "{task}", "what": "win rates"},
        ),
        by_seed="results/{task}_winrates_by_seed.csv",
        comparisons=report(
            "results/{task}_comparisons.csv",
            caption="../report/comparisons.rst",
            category="Win rates",
            labels={"task": "{task}", "what": "paired differences"},
        ),
        manifest="results/{task}_winrates.manifest.json",
    log:
        "logs/{task}/win_rates.log",
    benchmark:
        "logs/benchmarks/{task}/win_rates.jsonl"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("win_rates"),
        code=fingerprint("prefopt.analysis.win_rates"),
    shell:
        table_stage(
            "win_rates --verdicts {input.verdicts} --samples {input.samples} --summary {input.summary}"
            " --recipe {params.recipe} --out {output.table} --by-seed {output.by_seed} --comparisons {output.comparisons}"
            " --manifest {output.manifest}"
        )


rule win_rate_figure:
    input:
        table="results/{task}_winrates.csv",
        by_seed="results/{task}_winrates_by_seed.csv",
        manifest="results/{task}_winrates.manifest.json",
    output:
        svg=report(
            "results/{task}_winrates.svg",
            caption="../report/win_rate_figure.rst",
            category="Win rates",
            labels={"task": "{task}", "what": "figure"},
        ),
        png="results/{task}_winrates.png",
        pdf="results/{task}_winrates.pdf",
    log:
        "logs/{task}/win_rate_figure.log",
    benchmark:
        "logs/benchmarks/{task}/win_rate_figure.jsonl"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        code=fingerprint("prefopt.analysis.figures"),
    shell:
        table_stage(
            "win_rate_figure --win-rates {input.table} --by-seed {input.by_seed} --manifest {input.manifest}"
            " --out {output.svg} {output.png} {output.pdf}"
        )


rule win_rate_by_step:
    input:
        verdicts=of_stepped_runs("verdicts"),
        samples=of_stepped_runs("samples"),
        summary="results/data/{task}/summary.json",
    output:
        table=report(
            "results/{task}_winrate_by_step.csv",
            caption="../report/win_rate_by_step.rst",
            category="Win rates",
            labels={"task": "{task}", "what": "the win rate while a run trains"},
        ),
        svg=report(
            "results/{task}_winrate_by_step.svg",
            caption="../report/win_rate_by_step.rst",
            category="Win rates",
            labels={
                "task": "{task}",
                "what": "the win rate while a run trains, figure",
            },
        ),
        png="results/{task}_winrate_by_step.png",
        pdf="results/{task}_winrate_by_step.pdf",
    log:
        "logs/{task}/win_rate_by_step.log",
    benchmark:
        "logs/benchmarks/{task}/win_rate_by_step.jsonl"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("win_rate_by_step"),
        code=fingerprint("prefopt.analysis.win_rate_by_step"),
    shell:
        table_stage(
            "win_rate_by_step --verdicts {input.verdicts} --samples {input.samples} --summary {input.summary}"
            " --recipe {params.recipe} --table {output.table} --out {output.svg} {output.png} {output.pdf}"
        )


rule compute:
    input:
        unpack(compute_files),
    output:
        report(
            "results/compute.csv",
            caption="../report/compute.rst",
            category="Cost",
            labels={"task": "all", "what": "cost of every run"},
        ),
    log:
        "logs/compute.log",
    benchmark:
        "logs/benchmarks/compute.jsonl"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        files=arguments_of(compute_files),
        recipe=recipe_of_all(stage_recipes.compute_recipe),
        code=fingerprint("prefopt.analysis.compute"),
    shell:
        table_stage("compute {params.files} --recipe {params.recipe} --out {output}")


rule compute_figure:
    input:
        table="results/compute.csv",
        manifests=[
            f"results/{task}_winrates.manifest.json" for task in targets.tasks_of(config, "comparison", "transfer")
        ],
    output:
        svg=report(
            "results/compute.svg",
            caption="../report/compute.rst",
            category="Cost",
            labels={"task": "all", "what": "figure"},
        ),
        png="results/compute.png",
        pdf="results/compute.pdf",
    log:
        "logs/compute_figure.log",
    benchmark:
        "logs/benchmarks/compute_figure.jsonl"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        code=fingerprint("prefopt.analysis.compute_figure"),
    shell:
        table_stage(
            "compute_figure --table {input.table} --manifests {input.manifests} --out {output.svg} {output.png} {output.pdf}"
        )


rule paper:
    input:
        unpack(human_table),
        win_rates=lambda wildcards: [
            f"results/{task}_winrates.csv" for task in targets.tasks_of(config, "comparison", "transfer")
        ],
    output:
        report(
            "results/paper_vs_here.md",
            caption="../report/paper.rst",
            category="The paper's numbers",
            labels={"task": "all", "what": "the paper and here"},
        ),
    log:
        "logs/paper.log",
    benchmark:
        "logs/benchmarks/paper.jsonl"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        human=arguments_of(human_table),
        recipe=recipe_of_all(stage_recipes.paper_recipe),
        code=fingerprint("prefopt.analysis.paper"),
    shell:
        table_stage("paper --win-rates {input.win_rates} {params.human} --recipe {params.recipe} --out {output}")


rule training_figure:
    input:
        metrics=lambda wildcards: targets.training_metrics(config, wildcards.task),
        summary="results/data/{task}/summary.json",
    output:
        report(
            "results/{task}_training.svg",
            caption="../report/training_figure.rst",
            category="Training",
            labels={"task": "{task}", "what": "curves of every trainer"},
        ),
    log:
        "logs/{task}/training_figure.log",
    benchmark:
        "logs/benchmarks/{task}/training_figure.jsonl"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("training_figure"),
        code=fingerprint("prefopt.analysis.training_curves"),
    shell:
        table_stage(
            "training_figure --metrics {input.metrics} --summary {input.summary} --recipe {params.recipe} --out {output}"
        )


rule diagnosis:
    input:
        evaluations=runs_of_sweep,
        metrics=lambda wildcards: targets.measured_metrics(config, wildcards.task),
    output:
        table=report(
            "results/{task}_diagnosis.csv",
            caption="../report/diagnosis.rst",
            category="Training",
            labels={"task": "{task}", "what": "what became of every run's texts"},
        ),
        page=report(
            "results/{task}_diagnosis.md",
            caption="../report/diagnosis.rst",
            category="Training",
            labels={"task": "{task}", "what": "which runs collapsed, and what helps"},
        ),
    log:
        "logs/{task}/diagnosis.log",
    benchmark:
        "logs/benchmarks/{task}/diagnosis.jsonl"
    wildcard_constraints:
        task=one_of(with_frontier),
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("diagnosis"),
        code=fingerprint("prefopt.analysis.diagnosis"),
    shell:
        table_stage(
            "diagnosis --evaluations {input.evaluations} --metrics {input.metrics} --recipe {params.recipe}"
            " --out {output.table} --page {output.page}"
        )


rule overoptimization:
    input:
        unpack(optimized_files),
    output:
        table=report(
            "results/overoptimization.csv",
            caption="../report/overoptimization.rst",
            category="Over-optimisation",
            labels={"task": "all", "what": "learned and true reward, and alarms"},
        ),
        fits=report(
            "results/overoptimization_fits.csv",
            caption="../report/overoptimization.rst",
            category="Over-optimisation",
            labels={"task": "all", "what": "fits and peaks"},
        ),
        svg=report(
            "results/overoptimization.svg",
            caption="../report/overoptimization.rst",
            category="Over-optimisation",
            labels={"task": "all", "what": "figure"},
        ),
        png="results/overoptimization.png",
        pdf="results/overoptimization.pdf",
    log:
        "logs/overoptimization.log",
    benchmark:
        "logs/benchmarks/overoptimization.jsonl"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        files=arguments_of(optimized_files),
        recipe=recipe_of_all(stage_recipes.overoptimization_recipe),
        code=fingerprint("prefopt.analysis.overoptimization"),
    shell:
        table_stage(
            "overoptimization {params.files} --recipe {params.recipe} --table {output.table} --fits {output.fits}"
            " --out {output.svg} {output.png} {output.pdf}"
        )


rule examples:
    input:
        prompts="results/data/{task}/prompts.parquet",
        samples=of_every_run("samples", first=True),
        verdicts=of_every_run("verdicts", first=True),
        win_rates="results/{task}_winrates.csv",
    output:
        report(
            "results/{task}_examples.md",
            caption="../report/examples.rst",
            category="Win rates",
            labels={"task": "{task}", "what": "what the runs wrote, side by side"},
        ),
    log:
        "logs/{task}/examples.log",
    benchmark:
        "logs/benchmarks/{task}/examples.jsonl"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("examples"),
        code=fingerprint("prefopt.analysis.examples"),
    shell:
        table_stage(
            "examples --prompts {input.prompts} --samples {input.samples} --verdicts {input.verdicts}"
            " --win-rates {input.win_rates} --recipe {params.recipe} --out {output}"
        )
