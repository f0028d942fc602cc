"""What each trainer takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from prefopt.experiment import runs, targets
from prefopt.experiment.methods import Method
from prefopt.planning import memory, samplers, work
from prefopt.planning.architecture import Architecture, language_model_parameters, scorer_parameters
from prefopt.planning.estimate import Estimate
from prefopt.planning.memory import Engine, MicroBatch, Parts, Resident, Rows, micro_batch
from prefopt.planning.task import Task, at_most, passes, steps_of, trained
from prefopt.planning.work import Phase

Config = dict[str, Any]
RowsOf = Callable[[bool], Rows]  # whether long ones are asked for -> their lengths


def pretrain(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The base from scratch."""
    section, documents = task.section["pretrain"], task.counts.documents
    held_out = max(1, int(documents * work.PRETRAINING_VALIDATION_SHARE))
    room = section["max_positions"] - 1

    def rows(long: bool) -> Rows:
        return Rows(1, (at_most(task.tokens["document"], room, long),))

    return _on_examples(task, stage, "base", section, documents - held_out, held_out, rows)


def of_run(task: Task, stage: str, run: str | None) -> Estimate:
    """A run's trainer, or that of one of its rounds, perhaps with samples of its float32 weights while it trains."""
    run = run or stage
    method, values = runs.entry(task.config, task.name, run), runs.values(task.config, task.name, run)
    if method.trainer == "ppo":
        made = _ppo(task, stage, values)
    elif method.rounds:
        pairs = samplers.round_pairs(values)

        def sampled(long: bool) -> Rows:
            return task.sampled_pair_rows(values, long)

        made = _on_examples(task, stage, "reference", values, pairs["train"], pairs["validation"], sampled)
    else:
        completion = dict(method.values).get("completion")
        labels = method.trainer == "kto"
        by_completion = {"response": task.counts.demonstrations, "chosen": task.counts.pairs}
        table = task.counts.labels if labels else by_completion.get(completion or "", task.counts.pairs)

        def rows(long: bool) -> Rows:
            if labels:
                return task.label_rows(long)
            return task.rows(completion, long=long) if completion else task.pair_rows(long)

        counts = (table["train"], table["validation"])
        made = _on_examples(task, stage, method.starts_from, values, *counts, rows, read_before=labels)
    if run not in targets.stepped(task.config, task.name):
        return made
    sampling, by_step = task.section["sampling"], task.section["by_step"]
    prompts = task.section["evaluation"]["test_prompts"]
    drawn = _drawn(task, task.model(run)[1], task.engine(stage), sampling["max_new_tokens"], 1, prompts)
    times = (by_step["points"] + 1) * len(by_step["temperatures"])
    return dataclasses.replace(made, phases=[*made.phases, drawn.times(times)])


def reward_model(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The reward model of PPO and Best-of-N, from the reference policy."""
    table, section = task.counts.pairs, task.section["reward_model"]
    return _on_examples(task, stage, "reference", section, table["train"], table["validation"], task.pair_rows, 1)


def gold_reward_model(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The judge's own, from the base."""
    table, section = task.counts.gold, task.section["gold_reward_model"]
    return _on_examples(task, stage, "base", section, table["train"], table["test"], task.pair_rows, 1)


def classifier(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The true reward of labelled reviews, each read whole and as an excerpt, on average half of it."""
    section, counts = task.section["classifier"], task.counts
    whole = min(task.tokens["prompt"] + task.tokens["response"], section["max_length"])

    def rows(long: bool) -> Rows:
        return Rows(section["max_length"] if long else max(1, round(0.75 * whole)), ())

    training, validation = 2 * counts.labelled, 2 * counts.demonstrations["validation"]
    return _on_examples(task, stage, "base", section, training, validation, rows, 2)


def _ppo(task: Task, stage: str, section: Config) -> Estimate:
    """PPO against the learned reward: four models."""
    engine = task.engine(stage)
    name, model = task.model("reference")
    parts = _ppo_parts(task, model, section, engine, learned=True, others=[])
    phases = [phase.times(section["updates"]) for phase in _ppo_update(task, model, section, engine, learned=True)]
    held_out = {**section, "samples_per_prompt": 1, "prompts_per_update": section["validation_prompts"], "epochs": 0}
    evaluations = 1 + math.ceil(section["updates"] / section["evaluate_every"])
    phases += [phase.times(evaluations) for phase in _ppo_update(task, model, held_out, engine, learned=True)]
    return Estimate(stage, name, language_model_parameters(model), engine.processes, parts, phases)


def frontier_run(task: Task, stage: str, run: str | None) -> Estimate:
    """One run of a sweep, with the evaluations of its checkpoints."""
    run = run or next(iter(task.section["runs"]))
    method, values = runs.entry(task.config, task.name, run), runs.values(task.config, task.name, run)
    engine = task.engine(stage)
    name, model = task.model("reference")
    parameters = language_model_parameters(model)
    judge, others = _judge(task)
    if method.trainer == "ppo":
        learned = "reward_model" in method.needs
        parts = _ppo_parts(task, model, values, engine, learned=learned, others=others)
        updates = values["interval"] * task.section["evaluation"]["checkpoints"]
        phases = [phase.times(updates) for phase in _ppo_update(task, model, values, engine, learned=learned)]
    else:
        parts, phases = _on_pairs(task, model, values, engine, method, [Resident(parameters), *others])
    looked = _evaluations(task, model, judge, engine, task.section["evaluation"]["checkpoints"])
    return Estimate(stage, name, parameters, engine.processes, parts, phases + looked)


def _judge(task: Task) -> tuple[Architecture | None, list[Resident]]:
    """The model that is a sweep's true reward, and what of it is in memory; none where a program is."""
    if task.section["true_reward"]["source"] in targets.PROGRAMS:
        return None, []
    judge = task.model("true_reward")[1]
    return judge, [Resident(scorer_parameters(judge, 2))]


def round_evaluations(task: Task, stage: str, run: str | None) -> Estimate:
    """The policy after each round of a run of a sweep, and the reference policy beside it."""
    engine = task.engine(stage)
    name, model = task.model("reference")
    parameters = language_model_parameters(model)
    judge, others = _judge(task)
    learned = [Resident(scorer_parameters(model))] if targets.learns_reward(task.config, task.name) else []
    evaluation = task.section["evaluation"]
    drawn = (evaluation["max_new_tokens"], evaluation["samples_per_prompt"], evaluation["prompts"])
    parts = _beside_reference(task, model, *drawn, others=[*others, *learned])
    rounds = runs.values(task.config, task.name, run or "iterative_dpo")["rounds"]
    return Estimate(stage, name, parameters, engine.processes, parts, _evaluations(task, model, judge, engine, rounds))


def sampled_rounds(task: Task, stage: str, run: str | None) -> Estimate:
    """Samples of the policy after each round of a run of a task with win rates, the reference policy beside it."""
    engine = task.engine(stage)
    name, model = task.model("reference")
    parameters, new_tokens = language_model_parameters(model), task.section["sampling"]["max_new_tokens"]
    prompts = task.section["evaluation"]["test_prompts"]
    parts = _beside_reference(task, model, new_tokens, 1, prompts)
    rounds = runs.values(task.config, task.name, run or "iterative_dpo")["rounds"]
    times = (rounds + 1) * len(task.section["by_step"]["temperatures"])
    drawn = _drawn(task, model, engine, new_tokens, 1, prompts).times(times)
    return Estimate(stage, name, parameters, engine.processes, parts, [drawn])


def _beside_reference(
    task: Task, model: Architecture, new_tokens: int, n: int, prompts: int, others: Sequence[Resident] = ()
) -> Parts:
    """What samples of a policy, in float32, hold in memory, the reference policy and others beside it."""
    lengths = {"prompt": task.long_prompt, "new_tokens": new_tokens}
    resident = [*[Resident(language_model_parameters(model))] * 2, *others]
    return memory.sampling(resident, model, **lengths, n=n, prompts=prompts, dtype="float32", gpu_bytes=task.gpu_bytes)


def _on_examples(
    task: Task,
    stage: str,
    start: str,
    section: Config,
    examples: int,
    validation: int,
    rows: RowsOf,
    outputs: int | None = None,
    read_before: bool = False,
) -> Estimate:
    """A trainer on a fixed set of examples, with its evaluations on validation data.

    With `read_before` as much is read without gradients before each step and evaluation (KTO's mismatched completions).
    """
    name, model = task.model(start)
    engine = task.engine(stage)
    one = trained(model, section, outputs)
    batch = micro_batch(rows(True), engine, section["batch_size"])
    parts = memory.training([one], batch, engine, micro_batches=_micro_batches(section["batch_size"], batch, engine))
    learning = work.reading(model, rows(False), examples * section["epochs"], outputs)
    evaluations = 1 + math.ceil(steps_of(section, examples) / section["evaluate_every"])
    looking = work.reading(model, rows(False), validation * evaluations, outputs)
    phases = [
        Phase((passes(section, engine.checkpointing) + read_before) * learning),
        Phase((1 + read_before) * looking),
    ]
    return Estimate(stage, name, one.parameters, engine.processes, parts, phases)


def _on_pairs(
    task: Task, model: Architecture, values: Config, engine: Engine, method: Method, others: Sequence[Resident]
) -> tuple[Parts, list[Phase]]:
    """A run that learns from pairs or labels: so many steps, and all validation examples at every checkpoint.

    KTO reads as much again without gradients, mismatched completions.
    """
    labelled = method.trainer == "kto"

    def rows(long: bool) -> Rows:
        if labelled:
            return task.label_rows(long)
        both = task.pair_rows(long)
        return Rows(both.prompt, both.completions[:1]) if method.trainer == "sft" else both

    batch = micro_batch(rows(True), engine, values["batch_size"])
    micro_batches = _micro_batches(values["batch_size"], batch, engine)
    parts = memory.training([trained(model, values)], batch, engine, micro_batches=micro_batches, others=others)
    checkpoints = task.section["evaluation"]["checkpoints"]
    learning = work.reading(model, rows(False), values["interval"] * checkpoints * values["batch_size"])
    held_out = (task.counts.labels if labelled else task.counts.pairs)["validation"]
    looking = work.reading(model, rows(False), held_out * (checkpoints + 1))
    return parts, [
        Phase((passes(values, engine.checkpointing) + labelled) * learning),
        Phase((1 + labelled) * looking),
    ]


def _evaluations(
    task: Task, model: Architecture, judge: Architecture | None, engine: Engine, checkpoints: int
) -> list[Phase]:
    """Samples of every checkpoint and of the reference policy, in float32, their KL to it, and their true reward."""
    evaluation = task.section["evaluation"]
    prompts, k = evaluation["prompts"], evaluation["samples_per_prompt"]
    sampled = task.sampled(evaluation["max_new_tokens"])
    drawn = _drawn(task, model, engine, evaluation["max_new_tokens"], k, prompts)
    read = 2 * work.reading(model, Rows(task.tokens["prompt"], (sampled,) * k), prompts)
    if judge:
        read += work.reading(judge, Rows(task.text_tokens(long=False), ()), prompts * k, 2)
    times = checkpoints + 1
    return [drawn.times(times), Phase(read).times(times)]


def _ppo_parts(
    task: Task, model: Architecture, section: Config, engine: Engine, *, learned: bool, others: Sequence[Resident]
) -> Parts:
    """The larger of PPO's optimizer step and of its sampling, which has the optimizer's states beside it."""
    resident = [Resident(language_model_parameters(model)), *others]
    resident += [Resident(scorer_parameters(model))] if learned else []
    k = section["samples_per_prompt"]
    rows = Rows(task.long_prompt, (task.sampled(section["max_new_tokens"]),) * k)
    minibatch = math.ceil(section["prompts_per_update"] / section["minibatches"])
    batch = micro_batch(rows, engine, minibatch)
    both = [trained(model, section), trained(model, section, 1)]
    micro_batches = _micro_batches(minibatch, batch, engine)
    step = memory.training(both, batch, engine, micro_batches=micro_batches, others=resident)
    kept = {name: step[name] for name in ("weights", "optimizer", "other models")}
    if engine.processes > 1:
        kept["gathered weights"] = memory.gathered_for_reading(model, [], engine)
    rollout = memory.sampling(
        [],
        model,
        prompt=task.long_prompt,
        new_tokens=section["max_new_tokens"],
        n=k,
        prompts=math.ceil(section["prompts_per_update"] / engine.processes),
        dtype="float32",
        gpu_bytes=task.gpu_bytes,
        beside=memory.total(kept),
    )
    return max(step, rollout | kept, key=memory.total)


def _ppo_update(task: Task, model: Architecture, section: Config, engine: Engine, *, learned: bool) -> list[Phase]:
    """One update: sampling, in float32; one pass of reference, value and reward; the optimizer's passes."""
    prompts, k = section["prompts_per_update"], section["samples_per_prompt"]
    sampled = task.sampled(section["max_new_tokens"])
    drawn = _drawn(task, model, engine, section["max_new_tokens"], k, prompts)
    rows = Rows(task.tokens["prompt"], (sampled,) * k)
    policy, value = work.reading(model, rows, prompts), work.reading(model, rows, prompts, 1)
    trained_passes = passes(section, task.compute["activation_checkpointing"]) * section["epochs"]
    return [drawn, Phase(policy * (1 + trained_passes) + value * (1 + learned + trained_passes))]


def _drawn(task: Task, model: Architecture, engine: Engine, new_tokens: int, n: int, prompts: int) -> Phase:
    """Samples of a policy in training, in float32, of n completions a prompt."""
    sampled = task.sampled(new_tokens)
    lengths = {"prompt": task.tokens["prompt"], "sampled": sampled, "new_tokens": new_tokens}
    return work.sampling(model, **lengths, n=n, prompts=prompts, width=4, gpu=engine.gpu)


def _micro_batches(rows: int, batch: MicroBatch, engine: Engine) -> int:
    """Micro-batches of a step in each process."""
    return math.ceil(rows / engine.processes / batch.count)
