# The table of contents is where catalogues and modules look for it.
include: "workflow/Snakefile"
