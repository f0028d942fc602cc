# The table of contents is where catalogues and modules look for it.
include: "workflow/Snakefile"


workflow.default_target = "all"  # Snakemake takes no rule of an included file for it
