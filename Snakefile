# The experiments of the DPO paper: raw records -> tables -> models -> samples -> verdicts -> win rates.
# workflow/rules/ holds a file per stage; workflow/prefopt/ is the package whose stages the rules run.
import sys

from snakemake.utils import min_version

min_version("9.20")

HOME = str(workflow.current_basedir)  # `workflow.basedir` is another folder where Snakemake loads this as a module
sys.path.insert(0, f"{HOME}/workflow")

from prefopt.experiment import methods, runs, stage_recipes, targets, tasks
from prefopt.experiment.config import resolve
from prefopt.errors import UserError
from prefopt.store.fingerprint import fingerprint
from prefopt.store.files import canonical_json
from prefopt.planning.needs import needs


configfile: f"{HOME}/config/config.yaml"


try:
    config = resolve(config, workflow.configfiles)
except UserError as error:
    # Snakemake would add file, line and traceback to an exception of its own.
    sys.exit("\n".join(f"config: {line}" for line in str(error).splitlines()))


report: "workflow/report/workflow.rst"


wildcard_constraints:
    task="|".join(config["tasks"]),
    run=runs.NAME,
    seed=runs.SEED,
    judge="[a-z][a-z0-9_]*",


include: "workflow/rules/common.smk"
include: "workflow/rules/shards.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/base.smk"
include: "workflow/rules/reference.smk"
include: "workflow/rules/reward_model.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/sampling.smk"
include: "workflow/rules/judging.smk"
include: "workflow/rules/best_of_n.smk"
include: "workflow/rules/human.smk"
include: "workflow/rules/frontier.smk"
include: "workflow/rules/sentiment.smk"
include: "workflow/rules/rounds.smk"
include: "workflow/rules/analysis.smk"


rule all:
    input:
        lambda wildcards: targets.result_files(config),
