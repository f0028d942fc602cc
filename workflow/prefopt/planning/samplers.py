"""What sampling and reading with models as they are takes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from prefopt.experiment import runs, targets
from prefopt.planning import memory, work
from prefopt.planning.architecture import Architecture, language_model_parameters, scorer_parameters
from prefopt.planning.estimate import Estimate
from prefopt.planning.memory import MicroBatch, Resident, Rows, micro_batch
from prefopt.planning.task import Task
from prefopt.planning.work import Phase

Config = dict[str, Any]


def reference(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The reference policy's log-probabilities of all pairs."""
    return _cached(task, stage, task.pair_rows, sum(task.counts.pairs.values()))


def reference_labels(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The same of all labelled completions and, after the same prompts, of mismatched ones."""
    return _cached(task, stage, lambda long: task.label_rows(long, 2), sum(task.counts.labels.values()))


def round_reference(task: Task, stage: str, run: str | None) -> Estimate:
    """The reference policy's log-probabilities of a round's pairs."""
    values, engine = _of_round(task, run), task.engine(stage)
    name, model = task.model("reference")
    rows, pairs, parameters = task.sampled_pair_rows, round_pairs(values), language_model_parameters(model)
    batch = micro_batch(rows(values, long=True), engine, pairs["train"])
    parts = memory.reading([Resident(parameters)], model, batch, engine)
    phases = [Phase(work.reading(model, rows(values, long=False), sum(pairs.values())))]
    return Estimate(stage, name, parameters, engine.processes, parts, phases)


def round_samples(task: Task, stage: str, run: str | None) -> Estimate:
    """The completions of a round."""
    values = _of_round(task, run)
    return _sampled(
        *(task, stage, "reference"),
        n=values["n"],
        temperatures=[values["temperature"]],
        prompts=_round_prompts(values),
        new_tokens=values["max_new_tokens"],
    )


def round_scores(task: Task, stage: str, run: str | None) -> Estimate:
    """The reward model on a round's completions."""
    values = _of_round(task, run)
    groups, longest = _round_prompts(values), values["max_new_tokens"]
    return _scored(task, stage, "reward_model", n=values["n"], groups=groups, longest=longest)


def round_true_rewards(task: Task, stage: str, run: str | None) -> Estimate:
    """The frontier's reward of a round's completions."""
    values = _of_round(task, run)
    return _rewarded(task, stage, n=values["n"], groups=_round_prompts(values))


def round_judge_labels(task: Task, stage: str, run: str | None) -> Estimate:
    """The judge on a round's completions, where it is a gold reward model; any other takes no model here."""
    values, kind = _of_round(task, run), task.section["judge"]["kind"]
    if kind != "reward_model":
        return _without_model(task, stage, kind)
    return _scored(task, stage, "gold_reward_model", n=values["n"], groups=_round_prompts(values))


def round_implicit_rewards(task: Task, stage: str, run: str | None) -> Estimate:
    """The policy and then the reference policy on a round's completions; a row is cut to the token budget."""
    values, engine = _of_round(task, run), task.engine(stage)
    name, model = task.model("reference")
    n, sampled, parameters = values["n"], task.sampled(values["max_new_tokens"]), language_model_parameters(model)
    at_once = _completions_at_once(task, n, sampled)
    batch = MicroBatch(Rows(task.long_prompt, (sampled,) * at_once), 1)
    parts = memory.reading([Resident(parameters, task.compute["dtype"])], model, batch, engine)
    rows = Rows(task.tokens["prompt"], (sampled,) * at_once)
    phases = [Phase(work.reading(model, rows, 2 * _round_prompts(values) * math.ceil(n / at_once)))]
    return Estimate(stage, name, parameters, engine.processes, parts, phases)


def run_rewards(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The frontier's reward of what a run writes in the end."""
    return _rewarded(task, stage, n=1, groups=_prompts(task) * len(task.section["sampling"]["temperatures"]))


def round_pairs(values: Config) -> dict[str, int]:
    """A round's pairs by split, if no two completions of a prompt are equal."""
    each = math.comb(values["n"], 2) if values["pairs"] == "all" else 1
    return {"train": each * values["prompts"], "validation": each * values["validation_prompts"]}


def _of_round(task: Task, run: str | None) -> Config:
    return runs.values(task.config, task.name, run or "iterative_dpo")


def _round_prompts(values: Config) -> int:
    prompts: int = values["prompts"] + values["validation_prompts"]
    return prompts


def sample(task: Task, stage: str, run: str | None) -> Estimate:
    """A run's completions at every temperature; then the reference policy, loaded beside it, reads them."""
    sampling = task.section["sampling"]
    run = run or runs.reference(task.config, task.name)
    made = _sampled(
        task,
        stage,
        run,
        n=1,
        temperatures=sampling["temperatures"],
        prompts=_prompts(task),
        new_tokens=sampling["max_new_tokens"],
        shots=runs.entry(task.config, task.name, run).shots,
    )
    _, other = task.model("reference")
    dtype, sampled = task.compute["dtype"], task.sampled(sampling["max_new_tokens"])
    both = [Resident(made.parameters, dtype), Resident(language_model_parameters(other), dtype)]
    texts = _prompts(task) * len(sampling["temperatures"])
    engine = task.engine(stage)
    batch = micro_batch(Rows(task.long_prompt, (sampled,)), engine, texts)
    # Over several GPUs vLLM itself reads.
    reading = {} if (task.served(stage) or 0) > 1 else memory.reading(both, other, batch, engine)
    parts = max(made.parts, reading, key=memory.total)
    read = Phase(work.reading(other, Rows(task.tokens["prompt"], (sampled,)), texts))
    return dataclasses.replace(made, parts=parts, phases=[*made.phases, read])


def candidates(task: Task, stage: str, _: str | None = None) -> Estimate:
    """Best-of-N's candidates, at every temperature above 0."""
    sampling = task.section["sampling"]
    return _sampled(
        task,
        stage,
        "reference",
        n=task.section["best_of_n"]["n"],
        temperatures=[temperature for temperature in sampling["temperatures"] if temperature > 0],
        prompts=_prompts(task),
        new_tokens=sampling["max_new_tokens"],
    )


def pair_samples(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The completions of which a sweep's pairs are made."""
    pairs = task.section["pairs"]
    prompts = pairs["train_prompts"] + pairs["validation_prompts"]
    new_tokens, n = pairs["max_new_tokens"], pairs["completions"]
    return _sampled(task, stage, "sft", n=n, temperatures=[1.0], prompts=prompts, new_tokens=new_tokens)


def ceiling_samples(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The completions from which the optimal frontier is estimated."""
    sweep = task.section.get("ceiling")
    ceiling, longest = (sweep, "evaluation") if sweep else (task.section["frontier"], "sampling")
    prompts, n, new_tokens = ceiling["prompts"], ceiling["samples"], task.section[longest]["max_new_tokens"]
    return _sampled(task, stage, "reference", n=n, temperatures=[1.0], prompts=prompts, new_tokens=new_tokens)


def evaluations(task: Task, stage: str, run: str | None = None) -> Estimate:
    """The reference policy, and perhaps reward models, on what a run wrote while it trained."""
    engine, sampled = task.engine(stage), task.sampled(task.section["sampling"]["max_new_tokens"])
    name, model = task.model("reference")
    points = runs.in_rounds(task.config, task.name).get(run or "", task.section["by_step"]["points"])
    texts = task.section["evaluation"]["test_prompts"] * (points + 1)
    parameters, rows = language_model_parameters(model), Rows(task.tokens["prompt"], (sampled,))
    batch = micro_batch(Rows(task.long_prompt, (sampled,)), engine, texts)
    resident, phases = [Resident(parameters, task.compute["dtype"])], [Phase(work.reading(model, rows, texts))]
    learned = ["reward_model"] if targets.learns_reward(task.config, task.name) else []
    gold = ["gold_reward_model"] if task.section["frontier"]["reward"] == "gold_reward_model" else []
    for reward in learned + gold:
        _, scorer = task.model(reward)
        resident.append(Resident(scorer_parameters(scorer)))
        phases.append(Phase(work.reading(scorer, rows, texts, 1)))
    return Estimate(stage, name, parameters, engine.processes, memory.reading(resident, model, batch, engine), phases)


def score(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The reward model on all candidates."""
    temperatures = [temperature for temperature in task.section["sampling"]["temperatures"] if temperature > 0]
    return _scored(
        task, stage, "reward_model", n=task.section["best_of_n"]["n"], groups=_prompts(task) * len(temperatures)
    )


def candidate_rewards(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The true reward of all candidates; a program takes next to nothing."""
    temperatures = [temperature for temperature in task.section["sampling"]["temperatures"] if temperature > 0]
    groups = _prompts(task) * len(temperatures) * task.section["best_of_n"]["n"]
    return _rewarded(task, stage, n=1, groups=groups)


def judge_accuracy(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The gold reward model on the pairs that it was not trained on."""
    return _scored(task, stage, "gold_reward_model", n=2, groups=task.counts.gold["test"])


def judge(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The gold reward model on a run's samples, or on all candidates, and on the references."""
    groups = _prompts(task) * len(task.section["sampling"]["temperatures"])
    n = task.section["best_of_n"]["n"] if stage == "judge_candidates" else 1
    return _scored(task, stage, "gold_reward_model", n=n + 1, groups=groups)


def best_of_n(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The reference policy on the chosen candidates."""
    sampling, engine = task.section["sampling"], task.engine(stage)
    name, model = task.model("reference")
    sampled, texts = task.sampled(sampling["max_new_tokens"]), _prompts(task) * len(sampling["temperatures"])
    parameters = language_model_parameters(model)
    batch = micro_batch(Rows(task.long_prompt, (sampled,)), engine, texts)
    parts = memory.reading([Resident(parameters, task.compute["dtype"])], model, batch, engine)
    phases = [Phase(work.reading(model, Rows(task.tokens["prompt"], (sampled,)), texts))]
    return Estimate(stage, name, parameters, engine.processes, parts, phases)


def true_rewards(task: Task, stage: str, _: str | None = None) -> Estimate:
    """The true reward of all samples for pairs, and of those for the optimal frontier; a rule takes next to nothing."""
    section = task.section
    ceiling = section["ceiling" if task.frontier else "frontier"]
    texts = ceiling["prompts"] * ceiling["samples"]
    if task.frontier:
        pairs = section["pairs"]
        texts += (pairs["train_prompts"] + pairs["validation_prompts"]) * pairs["completions"]
    return _rewarded(task, stage, n=1, groups=texts)


def _cached(task: Task, stage: str, rows: Callable[[bool], Rows], count: int) -> Estimate:
    name, model = task.model("reference")
    engine, parameters = task.engine(stage), language_model_parameters(model)
    parts = memory.reading([Resident(parameters)], model, micro_batch(rows(True), engine, count), engine)
    phases = [Phase(work.reading(model, rows(False), count))]
    return Estimate(stage, name, parameters, engine.processes, parts, phases)


def _prompts(task: Task) -> int:
    evaluation = task.section["evaluation"]
    prompts: int = evaluation["validation_prompts"] + evaluation["test_prompts"]
    return prompts


def _sampled(
    task: Task,
    stage: str,
    policy: str,
    *,
    n: int,
    temperatures: Sequence[float],
    prompts: int,
    new_tokens: int,
    shots: int = 0,
) -> Estimate:
    """n completions of each prompt at every temperature, one where it is 0, perhaps after examples."""
    name, model = task.model(policy)
    before = shots * (task.tokens["prompt"] + task.tokens["response"])
    parameters, dtype, engine = language_model_parameters(model), task.compute["dtype"], task.engine(stage)
    mean: Config = {"prompt": before + task.tokens["prompt"], "sampled": task.sampled(new_tokens), "width": task.width}
    counts: Config = {"new_tokens": new_tokens, "prompts": prompts}
    longest, step = before + task.long_prompt, functools.partial(work.sampling, gpu=engine.gpu)
    if task.served(stage) is None or task.gpu_bytes is None:
        beside = [Resident(parameters, dtype)]
        parts = memory.sampling(beside, model, prompt=longest, n=n, dtype=dtype, gpu_bytes=task.gpu_bytes, **counts)
    else:
        room = round(engine.processes * memory.VLLM_SHARE * task.gpu_bytes) - parameters * task.width
        step = functools.partial(work.serving, room=room)
        parts = memory.served(parameters, model, longest + new_tokens, engine)
    phases = [step(model, n=n if temperature > 0 else 1, **mean, **counts) for temperature in temperatures]
    return Estimate(stage, name, parameters, engine.processes, parts, phases)


def _rewarded(task: Task, stage: str, *, n: int, groups: int) -> Estimate:
    """A frontier's reward of n completions of each prompt and temperature; a program takes next to nothing."""
    if not task.frontier:
        if task.section["frontier"]["reward"] == "oracle":
            return _without_model(task, stage, "oracle")
        return _scored(task, stage, "gold_reward_model", n=n, groups=groups)
    section = task.section["true_reward"]
    if section["source"] in targets.PROGRAMS:
        return _without_model(task, stage, section["source"])
    name, model = task.model("true_reward")
    engine = dataclasses.replace(task.engine(stage), dtype="float32")
    parameters = scorer_parameters(model, 2)
    batch = MicroBatch(Rows(task.text_tokens(long=True), ()), section["batch_size"])
    parts = memory.reading([Resident(parameters)], model, batch, engine)
    phases = [Phase(work.reading(model, Rows(task.text_tokens(long=False), ()), n * groups, 2))]
    return Estimate(stage, name, parameters, engine.processes, parts, phases)


def _without_model(task: Task, stage: str, name: str) -> Estimate:
    """A stage that takes next to nothing."""
    return Estimate(stage, name, 0, task.engine(stage).processes, {}, [])


def _scored(task: Task, stage: str, start: str, *, n: int, groups: int, longest: int | None = None) -> Estimate:
    """A reward model on n completions of each prompt and temperature; a row is cut to the token budget."""
    name, model = task.model(start)
    longest = task.section["sampling"]["max_new_tokens"] if longest is None else longest
    engine, sampled = task.engine(stage), task.sampled(longest)
    at_once = _completions_at_once(task, n, sampled)
    parameters = scorer_parameters(model)
    parts = _scoring_parts(task, model, parameters, at_once, sampled, stage)
    rows = Rows(task.tokens["prompt"], (sampled,) * at_once)
    flops = work.reading(model, rows, groups * math.ceil(n / at_once), 1)
    return Estimate(stage, name, parameters, engine.processes, parts, [Phase(flops)])


def _completions_at_once(task: Task, n: int, sampled: int) -> int:
    """Of a prompt's n completions those that are read in one row, within the token budget."""
    return max(1, min(n, (task.compute["token_budget"] - task.tokens["prompt"]) // sampled))


def _scoring_parts(
    task: Task, model: Architecture, parameters: int, at_once: int, sampled: int, stage: str
) -> memory.Parts:
    batch = MicroBatch(Rows(task.long_prompt, (sampled,) * at_once), 1)
    return memory.reading([Resident(parameters)], model, batch, task.engine(stage))
