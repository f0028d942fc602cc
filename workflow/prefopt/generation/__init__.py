"""Completions of policies: sampled, scored by a reward model, chosen as the best of n."""
