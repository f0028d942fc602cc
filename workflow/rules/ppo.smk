# PPO against the learned reward, with a penalty for leaving the reference policy.


rule ppo:
    input:
        model=model_files("reference"),
        reward_model="results/models/{task}/reward_model",
        prompts="results/data/{task}/training/prompts.parquet",
    output:
        model=directory("results/models/{task}/ppo"),
        metrics="results/training/{task}/ppo.jsonl",
    log:
        "logs/{task}/ppo.log",
    benchmark:
        "logs/benchmarks/{task}/ppo.jsonl"
    # On the longest path.
    priority: 1
    conda:
        "../../envs/model.yaml"
    threads: MODEL_THREADS
    resources:
        **model_needs("ppo"),
    params:
        **model("reference"),
        **recipe("ppo"),
        code=fingerprint("prefopt.training.ppo"),
    shell:
        model_stage(
            "ppo --model {params.model} --reward-model {input.reward_model} --prompts {input.prompts}"
            " --recipe {params.recipe} --work work/{wildcards.task}/ppo --out {output.model}"
            " --metrics {output.metrics}"
        )
