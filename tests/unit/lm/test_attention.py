"""Packed rows as sequences for flash attention: the same numbers as by masks, with a stand-in for the GPU's kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefopt.lm import attention
from prefopt.lm.attention import PackedLayout, Scores, prefopt_attention
from prefopt.lm.batching import Row


def layout() -> PackedLayout:
    return PackedLayout([(5, [3, 4, 1]), (2, [6]), (3, [])], torch.device("cpu"))


def plain_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *longest: int,
    **options: object,
) -> Tensor:
    """What `varlen_attn` is documented to compute with `window_size=(-1, 0)`: the last query sees all keys."""
    assert options["window_size"] == (-1, 0)
    outputs, lengths = [], []
    for i in range(len(query_starts) - 1):
        queries, keys = slice(*query_starts[i : i + 2].tolist()), slice(*key_starts[i : i + 2].tolist())
        q, k, v = query[queries].transpose(0, 1), key[keys].transpose(0, 1), value[keys].transpose(0, 1)
        lengths.append((q.shape[1], k.shape[1]))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    assert longest == tuple(map(max, zip(*lengths, strict=True)))
    return torch.cat(outputs)


def test_sequences_give_outputs_and_gradients_of_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_attn", plain_flash)
    results = []
    for in_sequences in (False, True):
        torch.manual_seed(0)
        query, key, value = (torch.randn(1, 2, 24, 8, requires_grad=True) for _ in range(3))
        if in_sequences:
            output = attention._in_sequences(query, key, value, None, layout())
        else:
            output = attention._packed(query, key, value, None, Scores(None), layout())
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results.append((output, query.grad, key.grad, value.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_under_autocast_a_cpu_attends_in_float32() -> None:
    """There torch's attention would narrow what it is given, and be slower."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 24, 8) for _ in range(3))
    module = torch.nn.Identity()
    plain = prefopt_attention(module, query, key, value, None, packed=layout())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = prefopt_attention(module, query, key, value.bfloat16().float(), None, packed=layout())[0]
        narrow = prefopt_attention(module, query.bfloat16(), key.bfloat16(), value.bfloat16(), None, packed=layout())[0]
    assert found.dtype == narrow.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=0, atol=0.01)
    torch.testing.assert_close(narrow, plain, rtol=0, atol=0.03)
    of_same = prefopt_attention(module, *(x.bfloat16().float() for x in (query, key, value)), None, packed=layout())[0]
    torch.testing.assert_close(narrow, of_same, rtol=0, atol=0)


class OnGPU(Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("can", [True, False])
def test_queries_on_a_gpu_are_asked_by_what_they_are_whether_flash_attention_can(
    can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, taken = [], []
    monkeypatch.setattr(attention, "varlen_attn", lambda *a, **options: taken.append(1) or plain_flash(*a, **options))
    monkeypatch.setattr(attention, "flash_can", lambda *of: asked.append(of) or can)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 24, 8) for _ in range(3))
    expected = attention._packed(query, key, value, None, Scores(None), layout()).transpose(1, 2)
    module, there = torch.nn.Module(), query.as_subclass(OnGPU)
    for mine, options in ((query, {}), (there, {}), (there, {"softcap": 50.0})):
        output, _ = attention.prefopt_attention(module, mine, key, value, None, packed=layout(), **options)
        if not options:
            torch.testing.assert_close(output.as_subclass(Tensor), expected)
    attention.prefopt_attention(module, there, key, value[..., :4], None, packed=layout())
    assert asked == [(torch.device("cpu"), torch.float32, 8)], "once, of the plain scores and equal widths there"
    assert taken == ([1] if can else [])


def test_a_completion_has_its_prompt_and_itself_as_keys() -> None:
    packed = layout()
    of = packed.sequences
    assert of.query_starts.tolist() == [0, 5, 8, 12, 13, 15, 21, 24]
    assert of.key_starts.tolist() == [0, 5, 13, 22, 28, 30, 38, 41]
    assert of.keys[22:28].tolist() == [0, 1, 2, 3, 4, 12] and of.keys[30:38].tolist() == [13, 14, *range(15, 21)]
    assert (of.longest_query, of.longest_key) == (6, 9)
    own, copies = packed.key_places
    assert of.keys[own].tolist() == list(range(24)), "each position is a key of its own sequence"
    copied = [(positions.tolist(), of.keys[places].tolist()) for positions, places in copies]
    assert [positions for positions, _ in copied] == [[0, 1, 2, 3, 4, 13, 14], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert all(positions == found for positions, found in copied)
    used = torch.cat([own, *(places for _, places in copies)])
    assert sorted(used.tolist()) == list(range(len(of.keys))), "every key's gradient goes to one position"


def test_float32_is_not_given_to_flash_attention() -> None:
    assert not attention.flash_can(torch.device("cuda"), torch.float32, 8)


def test_flash_attention_is_taken_where_it_gives_what_the_masks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, cpu = attention.flash_can.__wrapped__, torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float16):
        for change, same in ((lambda x: x, True), (lambda x: x + 0.1, False), (lambda x: x * 1.2, False)):
            monkeypatch.setattr(attention, "varlen_attn", lambda *a, change=change, **o: change(plain_flash(*a, **o)))
            with torch.inference_mode():  # as where samples are drawn
                assert tried(cpu, dtype, 8) is same


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
def test_flash_attention_that_fails_is_not_taken(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*values: object, **options: object) -> Tensor:
        raise error("no kernel\nfor this device")

    monkeypatch.setattr(attention, "varlen_attn", failing)
    assert attention.flash_can.__wrapped__(torch.device("cpu"), torch.bfloat16, 8) is False


def test_a_layout_of_rows_lies_on_the_device_that_is_asked_for() -> None:
    made = attention.packed_layout([Row((1, 2), ((3,), (4, 5)))], torch.device("meta"))
    assert made.sequences.keys.device.type == "meta"
