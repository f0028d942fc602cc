# The reward model of PPO and Best-of-N, and the judge's own, which starts from the base and sees other pairs.


rule reward_model:
    input:
        model=model_files("reference"),
        data=learned_table("preferences"),
        demonstrations="results/data/{task}/training/demonstrations.parquet",
    output:
        model=directory("results/{seed}models/{task}/reward_model"),
        metrics="results/{seed}training/{task}/reward_model.jsonl",
    log:
        "logs/{seed}{task}/reward_model.log",
    benchmark:
        "logs/benchmarks/{seed}{task}/reward_model.jsonl"
    # On the longest path.
    priority: 2
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("reward_model"),
    params:
        **model("reference"),
        **recipe("reward_model"),
        code=fingerprint("prefopt.training.reward"),
    shell:
        model_stage(
            "reward --model {params.model} --data {input.data} --demonstrations {input.demonstrations}"
            " --recipe {params.recipe} --work {work}/{wildcards.seed}{wildcards.task}/reward_model --out {output.model}"
            " --metrics {output.metrics}"
        )


rule gold_reward_model:
    input:
        model=model_files("base"),
        data="results/data/{task}/gold_preferences.parquet",
        demonstrations="results/data/{task}/training/demonstrations.parquet",
    output:
        model=directory("results/models/{task}/gold_reward_model"),
        metrics="results/training/{task}/gold_reward_model.jsonl",
    log:
        "logs/{task}/gold_reward_model.log",
    benchmark:
        "logs/benchmarks/{task}/gold_reward_model.jsonl"
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("gold_reward_model"),
    params:
        **model("base"),
        **recipe("gold_reward_model"),
        code=fingerprint("prefopt.training.reward"),
    shell:
        model_stage(
            "reward --model {params.model} --data {input.data} --demonstrations {input.demonstrations}"
            " --recipe {params.recipe} --work {work}/{wildcards.task}/gold_reward_model --out {output.model}"
            " --metrics {output.metrics}"
        )
