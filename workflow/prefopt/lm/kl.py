"""The exact KL divergence between two policies at every step of given completions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt.lm.batching import Row
from prefopt.lm.engine import head_logits, output_head
from prefopt.lm.logprobs import completion_hidden_states

# Log-probabilities of at most this many bytes are held at once for each of the two policies.
_CHUNK_BYTES = 32 * 2**20


@torch.no_grad()
def completion_kls(policy: nn.Module, reference: nn.Module, rows: Sequence[Row]) -> Tensor:
    """Sum over a completion's steps t of KL(pi(.|x, y_<t) || pi_ref(.|x, y_<t)), over the whole vocabulary.

    On completions sampled from the policy its mean is an unbiased estimate of the sequence-level KL (the paper's
    footnote 3), of much lower variance than the log-ratio of the sampled tokens, and never negative.

    Args:
        policy: a causal language model loaded by `prefopt.lm.models`.
        reference: another with the same vocabulary.
        rows: prompts with completions sampled from the policy; the step that samples EOS counts.

    Returns:
        float32 [number of completions], in nats, on the CPU; rows in order, completions in order.
    """
    models = (policy, reference)
    hidden = [completion_hidden_states(model, rows)[0] for model in models]
    steps = len(hidden[0])
    chunk = max(1, _CHUNK_BYTES // (4 * output_head(policy).weight.shape[0]))
    kls = torch.empty(steps, device=hidden[0].device)
    with torch.autocast(hidden[0].device.type, enabled=False):
        for start in range(0, steps, chunk):
            part = slice(start, start + chunk)
            logps, reference_logps = (
                F.log_softmax(head_logits(model, h[part].to(output_head(model).weight.dtype)), dim=-1)
                for model, h in zip(models, hidden, strict=True)
            )
            kls[part] = (logps.exp() * (logps - reference_logps)).sum(dim=-1)
    lengths = torch.tensor([len(completion) for row in rows for completion in row.completions])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return torch.zeros(len(lengths)).index_add(0, owner, kls.cpu())
