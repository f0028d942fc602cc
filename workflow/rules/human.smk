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
        "python -m prefopt human_study --samples {input.samples} --prompts {input.prompts} --recipe {params.recipe:q}"
        " --pages {output.pages} --items {output.compared} --key {output.key} > {log} 2>&1"


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
        "python -m prefopt simulated_votes --key {input.key} --items {input.compared} --recipe {params.recipe:q}"
        " --out {output} > {log} 2>&1"


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
        "python -m prefopt human_votes --exports {input.exports} --key {input.key} --items {input.compared}"
        " --recipe {params.recipe:q} --out {output.votes} --raters {output.raters} > {log} 2>&1"


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
        "python -m prefopt --threads {threads} --gpus {resources.gpu} judge_items --items {input.compared} --prompts"
        " {input.prompts}"
        " {params.judge} --recipe {params.recipe:q} --out {output} > {log} 2>&1"


rule human_agreement:
    input:
        votes=lambda wildcards: [f"results/human/{task}/votes.parquet" for task in plan.counted_studies(config)],
        verdicts=lambda wildcards: [path for _, _, path in plan.study_tables(config)],
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
        "python -m prefopt human_agreement --votes {input.votes} --verdicts {input.verdicts}"
        " --recipe {params.recipe:q} --out {output} > {log} 2>&1"
