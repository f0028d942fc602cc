"""The experiment of the DPO paper (Rafailov et al. 2023) as the stages of one workflow."""
