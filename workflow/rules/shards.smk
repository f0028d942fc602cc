# Work that is cut into shards, each a job of its own, and the tables that they are gathered into. With one shard, the
# default, a stage writes its table itself and nothing is gathered.


# How many shards; `--set-scatter sampling=8` sets another number.
scattergather:
    sampling=1,
    scoring=1,
    judging=1,


# The shards are gone once they are gathered: a change of gather.py, or `--forcerun gather`, makes them again.
rule gather:
    input:
        shards_of_table,
    output:
        "results/{table}.parquet",
    log:
        "logs/gather/{table}.log",
    benchmark:
        "logs/benchmarks/gather/{table}.jsonl"
    wildcard_constraints:
        table="|".join(pattern for process, pattern in SCATTERED.items() if shard_count(process) > 1) or NOTHING,
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        **TABLE_RESOURCES,
    params:
        code=fingerprint("prefopt.store.gather"),
    shell:
        table_stage("gather --parts {input} --out {output}")
