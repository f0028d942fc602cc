# Log-probabilities of every pair, or of every labelled completion, under the reference policy, computed once.


rule reference:
    input:
        model=model_files("reference"),
        data=learned_table("preferences"),
    output:
        "results/{seed}logprobs/{task}/reference.parquet",
    log:
        "logs/{seed}{task}/reference.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/reference.jsonl"
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("reference"),
    params:
        **model("reference"),
        **recipe("reference"),
        code=fingerprint("prefopt.training.reference"),
    shell:
        model_stage("reference --model {params.model} --data {input.data} --recipe {params.recipe} --out {output}")


use rule reference as reference_labels with:
    input:
        model=model_files("reference"),
        data=learned_table("labels"),
    output:
        "results/{seed}logprobs/{task}/reference_labels.parquet",
    log:
        "logs/{seed}{task}/reference_labels.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/reference_labels.jsonl"
    resources:
        **model_needs("reference_labels"),
