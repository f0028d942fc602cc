# Direct preference optimization, from the reference policy and its cached log-probabilities.


rule dpo:
    input:
        model=model_files("reference"),
        data="results/data/{task}/preferences.parquet",
        reference="results/logprobs/{task}/reference.parquet",
    output:
        model=directory("results/models/{task}/dpo"),
        metrics="results/training/{task}/dpo.jsonl",
    log:
        "logs/{task}/dpo.log",
    benchmark:
        "logs/benchmarks/{task}/dpo.jsonl"
    wildcard_constraints:
        task=one_of([task for task in config["tasks"] if not targets.has_steps(config, task)]),
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("dpo"),
    params:
        **model("reference"),
        **recipe("dpo"),
        by_step=[],
        code=fingerprint("prefopt.training.dpo"),
    shell:
        model_stage(
            "dpo --model {params.model} --data {input.data} --reference {input.reference} --recipe {params.recipe}"
            " {params.by_step} --work work/{wildcards.task}/dpo --out {output.model} --metrics {output.metrics}"
        )


# The same, sampled while it trains.
use rule dpo as dpo_with_samples with:
    input:
        model=model_files("reference"),
        data="results/data/{task}/preferences.parquet",
        reference="results/logprobs/{task}/reference.parquet",
        prompts="results/data/{task}/prompts.parquet",
    output:
        model=directory("results/models/{task}/dpo"),
        metrics="results/training/{task}/dpo.jsonl",
        samples="results/samples/{task}/dpo_by_step.parquet",
    wildcard_constraints:
        task=one_of([task for task in config["tasks"] if targets.has_steps(config, task)]),
    params:
        **model("reference"),
        **recipe("dpo"),
        by_step=by_step_arguments,
        code=fingerprint("prefopt.training.dpo"),
