# A study with people: pages for raters, their votes, and how far the judges agree with them.


rule human_study:
    input:
        samples=compared_samples,
        prompts="results/data/{task}/prompts.parquet",
    output:
        pages=directory("results/human/{task}/pages"),
        compared="results/human/{task}/items.parquet",
        key="results/human/{task}/key.json",
    log:
        "logs/{task}/human_study.log",
    benchmark:
        "logs/benchmarks/{task}/human_study.jsonl"
    conda:
        "../../envs/judge.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("human_study"),
        code=fingerprint("prefopt.judging.human.study"),
    shell:
        # The secret lies beside the votes and outside results/: Snakemake deletes outputs before a job, and people results/.
        table_stage(
            "human_study --samples {input.samples} --prompts {input.prompts} --recipe {params.recipe}"
            " --pages {output.pages} --items {output.compared} --key {output.key}"
            " --secret {human}/secrets/{wildcards.task}"
        )


rule simulated_votes:
    input:
        key="results/human/{task}/key.json",
        compared="results/human/{task}/items.parquet",
    output:
        directory("results/human/{task}/simulated_votes"),
    log:
        "logs/{task}/simulated_votes.log",
    benchmark:
        "logs/benchmarks/{task}/simulated_votes.jsonl"
    conda:
        "../../envs/judge.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("simulated_votes"),
        code=fingerprint("prefopt.judging.human.simulated"),
    shell:
        table_stage(
            "simulated_votes --key {input.key} --items {input.compared} --recipe {params.recipe} --out {output}"
        )


rule human_votes:
    input:
        exports=exported_votes,
        key="results/human/{task}/key.json",
        compared="results/human/{task}/items.parquet",
    output:
        votes="results/human/{task}/votes.parquet",
        raters="results/human/{task}/raters.csv",
    log:
        "logs/{task}/human_votes.log",
    benchmark:
        "logs/benchmarks/{task}/human_votes.jsonl"
    conda:
        "../../envs/judge.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        **recipe("human_votes"),
        code=fingerprint("prefopt.judging.human.votes"),
    shell:
        table_stage(
            "human_votes --exports {input.exports} --key {input.key} --items {input.compared}"
            " --recipe {params.recipe} --out {output.votes} --raters {output.raters}"
        )


rule judge_items:
    input:
        unpack(made(judge_files)),
        compared="results/human/{task}/items.parquet",
        prompts="results/data/{task}/prompts.parquet",
    output:
        "results/human/{task}/verdicts_{judge}.parquet",
    log:
        "logs/{task}/judge_items_{judge}.log",
    benchmark:
        "logs/benchmarks/{task}/judge_items_{judge}.jsonl"
    conda:
        "../../envs/judge.yaml"
    threads: MODEL_THREADS
    resources:
        **judge_needs("judge"),
    params:
        **judge_params("prefopt.judging.items"),
    shell:
        judging_stage(
            "judge_items --items {input.compared} --prompts {input.prompts} {params.judge} --recipe {params.recipe}"
            " --out {output}"
        )


rule human_agreement:
    input:
        votes=lambda wildcards: [f"results/human/{task}/votes.parquet" for task in targets.counted_studies(config)],
        verdicts=lambda wildcards: [path for _, _, path in targets.study_tables(config)],
    output:
        report(
            "results/human_agreement.csv",
            caption="../report/human_agreement.rst",
            category="Judges",
            labels={"task": "all", "what": "people and judges"},
        ),
    log:
        "logs/human_agreement.log",
    benchmark:
        "logs/benchmarks/human_agreement.jsonl"
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        recipe=recipe_of_all(stage_recipes.human_agreement_recipe),
        code=fingerprint("prefopt.analysis.human_agreement"),
    shell:
        table_stage(
            "human_agreement --votes {input.votes} --verdicts {input.verdicts} --recipe {params.recipe}"
            " --out {output}"
        )
