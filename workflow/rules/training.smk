# A model for each run, by a rule for each method: SFT, which is also the reference policy, Preferred-FT, DPO, PPO. With
# samples a policy is also sampled while it trains.


SAMPLES_BY_STEP = "results/{seed}samples/{task}/{run}_by_step.parquet"


for method, sampled in itertools.product(trained_at_once(), (False, True)):

    rule:
        name:
            f"{method}_with_samples" if sampled else method
        input:
            unpack(made(training_files)),
            **({"sampled_prompts": PROMPTS_TABLE} if sampled else {}),
            model=model_files(started_from),
        output:
            **({"samples": SAMPLES_BY_STEP} if sampled else {}),
            model=directory("results/{seed}models/{task}/{run}"),
            metrics="results/{seed}training/{task}/{run}.jsonl",
        log:
            "logs/{seed}{task}/{run}.log",
        benchmark:
            "logs/benchmarks/{seed}{task}/{run}.jsonl"
        wildcard_constraints:
            task=with_runs(trained_runs(method, sampled), "_by_step" if sampled else ""),
        # On the longest path.
        priority: 1
        conda:
            "../../envs/model.yaml"
        threads: MODEL_THREADS
        resources:
            **model_needs(method),
        params:
            **model(started_from),
            **training_params(training_files),
            **(by_step("samples", SAMPLES_BY_STEP) if sampled else {"by_step": []}),
            code=lambda wildcards: fingerprint(*targets.trainer_code(config, wildcards.task, wildcards.run)),
        shell:
            model_stage(
                "{params.stage} --model {params.model} {params.files} --recipe {params.recipe} {params.by_step}"
                " --work {work}/{wildcards.seed}{wildcards.task}/{wildcards.run} --out {output.model} --metrics {output.metrics}"
            )
